//! Functions that a caller may look up but that this device does not support. They return
//! `CUDA_ERROR_NOT_SUPPORTED`.
//!
//! They are declared without parameters: under the C calling convention, a function may be
//! called with more arguments than it reads.

use crate::driver::codes::{self, Code};
use crate::driver::{Failure, Need, call};

macro_rules! unsupported {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name() -> Code {
                call(stringify!($name), Need::CONTEXT, |_| Err(Failure(codes::NOT_SUPPORTED)))
            }
        )*
    };
}

unsupported! {
    cuCtxDisablePeerAccess
    cuCtxEnablePeerAccess
    cuDestroyExternalMemory
    cuDeviceGetDefaultMemPool
    cuDeviceGetMemPool
    cuDeviceSetMemPool
    cuExternalMemoryGetMappedBuffer
    cuGraphDebugDotPrint
    cuImportExternalMemory
    cuLaunchCooperativeKernel
    cuMemAdvise
    cuMemAdvise_v2
    cuMemAllocFromPoolAsync
    cuMemAllocManaged
    cuMemHostGetDevicePointer_v2
    cuMemPoolCreate
    cuMemPoolDestroy
    cuMemPoolGetAttribute
    cuMemPoolSetAttribute
    cuMemPoolTrimTo
    cuMemPrefetchAsync
    cuMemPrefetchAsync_v2
    cuMemcpyPeer
    cuMemcpyPeerAsync
    cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialClusterSize
    cuStreamAttachMemAsync
}
