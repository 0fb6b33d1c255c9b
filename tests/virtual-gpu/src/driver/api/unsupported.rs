//! Functions that a caller may look up and that this device does not have. They say so.
//!
//! They take no parameters here: with the C calling convention a function may be called
//! with more arguments than it looks at.

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
