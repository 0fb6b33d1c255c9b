//! Drives the virtual GPU through cudarc: the library is loaded by its path, found as the
//! driver, and does what a program asks of a GPU.
//!
//! A process has only one driver, so the tests run one after the other.

use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, DriverError, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;
use libloading::Library;
use std::ffi::{CString, c_char, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// `add(float* x, float y, u32 n)`: adds y to n numbers.
const ADD: &str = r#"
.version 8.4
.target sm_80
.address_size 64

.visible .entry add(
    .param .u64 add_param_0,
    .param .f32 add_param_1,
    .param .u32 add_param_2
)
{
    .reg .pred %p<2>;
    .reg .f32 %f<4>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<5>;

    ld.param.u64 %rd1, [add_param_0];
    ld.param.f32 %f1, [add_param_1];
    ld.param.u32 %r1, [add_param_2];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra $L__BB0_2;
    cvta.to.global.u64 %rd2, %rd1;
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd4, %rd2, %rd3;
    ld.global.f32 %f2, [%rd4];
    add.f32 %f3, %f2, %f1;
    st.global.f32 [%rd4], %f3;
$L__BB0_2:
    ret;
}
"#;

/// The virtual GPU of this process, held exclusively by one test.
struct Gpu {
    library: &'static Library,
    _alone: MutexGuard<'static, ()>,
}

fn gpu() -> Gpu {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let library = LIBRARY.get_or_init(|| {
        let path = std::env::current_exe()
            .unwrap()
            .parent()
            .unwrap()
            .join("libvirtual_gpu.so");
        // SAFETY: loading the library runs no code.
        unsafe { Library::new(&path) }.unwrap()
    });
    let gpu = Gpu {
        library,
        _alone: alone,
    };
    gpu.call::<extern "C" fn()>("vgpu_reset")();
    gpu
}

impl Gpu {
    fn call<F: Copy>(&self, name: &str) -> F {
        // SAFETY: the callers specify the types that control.rs declares for the functions.
        unsafe { *self.library.get::<F>(name.as_bytes()).unwrap() }
    }

    fn set(&self, key: &str, value: &str) {
        let (key, value) = (CString::new(key).unwrap(), CString::new(value).unwrap());
        let set: extern "C" fn(*const c_char, *const c_char) -> i32 = self.call("vgpu_set");
        assert_eq!(set(key.as_ptr(), value.as_ptr()), 0);
    }

    fn statistic(&self, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        self.call::<extern "C" fn(*const c_char) -> u64>("vgpu_statistic")(name.as_ptr())
    }

    fn fail(&self, function: &str, nth: u64, code: i32) {
        let function = CString::new(function).unwrap();
        self.call::<extern "C" fn(*const c_char, u64, i32, u64)>("vgpu_fail")(
            function.as_ptr(),
            nth,
            code,
            1,
        );
    }

    fn violations(&self) -> String {
        let mut buffer = vec![0u8; 1 << 16];
        let read: extern "C" fn(*mut c_char, usize) -> usize = self.call("vgpu_violations");
        let len = read(buffer.as_mut_ptr().cast(), buffer.len());
        String::from_utf8(buffer[..len.min(buffer.len() - 1)].to_vec()).unwrap()
    }
}

fn context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: the tests order their work themselves.
    unsafe { context.disable_event_tracking() };
    context
}

#[test]
fn a_program_allocates_copies_launches_and_replays() {
    let gpu = gpu();
    // SAFETY: only checks whether the library is present.
    assert!(unsafe { sys::is_culib_present() });
    {
        let context = context();
        assert_eq!(context.name().unwrap(), "quell virtual GPU");
        assert_eq!(context.compute_capability().unwrap(), (8, 0));
        let stream = context.new_stream().unwrap();
        let module = context.load_module(Ptx::from_src(ADD)).unwrap();
        let add = module.load_function("add").unwrap();
        let n = 1000u32;
        let mut x = stream.clone_htod(&vec![1.0f32; n as usize]).unwrap();
        let shape = LaunchConfig {
            grid_dim: (4, 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the parameters match those of the kernel.
        unsafe {
            stream
                .launch_builder(&add)
                .arg(&mut x)
                .arg(&2.0f32)
                .arg(&n)
                .launch(shape)
        }
        .unwrap();
        assert_eq!(stream.clone_dtoh(&x).unwrap(), vec![3.0; n as usize]);

        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .unwrap();
        for _ in 0..3 {
            // SAFETY: as above.
            unsafe {
                stream
                    .launch_builder(&add)
                    .arg(&mut x)
                    .arg(&1.0f32)
                    .arg(&n)
                    .launch(shape)
            }
            .unwrap();
        }
        let graph = stream
            .end_capture(CUgraphInstantiate_flags(0))
            .unwrap()
            .unwrap();
        assert_eq!(
            stream.clone_dtoh(&x).unwrap(),
            vec![3.0; n as usize],
            "a capture runs nothing"
        );
        let before = gpu.statistic("synchronisations");
        for _ in 0..5 {
            graph.launch().unwrap();
        }
        assert_eq!(gpu.statistic("synchronisations"), before);
        assert_eq!(stream.clone_dtoh(&x).unwrap(), vec![18.0; n as usize]);
        assert_eq!(gpu.statistic("graph_launches"), 5);
        assert_eq!(gpu.statistic("launches"), 16);
        assert!(gpu.statistic("warp_instructions") > 16 * 32);
    }
    assert_eq!(gpu.violations(), "");
}

#[test]
fn streams_wait_for_events_in_every_order() {
    let gpu = gpu();
    for schedule in ["late", "eager", "shuffle:1", "shuffle:2", "shuffle:3"] {
        gpu.set("schedule", schedule);
        let context = context();
        let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let module = context.load_module(Ptx::from_src(ADD)).unwrap();
        let add = module.load_function("add").unwrap();
        let mut x = first.alloc_zeros::<f32>(64).unwrap();
        for step in 0..8 {
            let stream = if step % 2 == 0 { &first } else { &second };
            // SAFETY: the parameters match those of the kernel.
            unsafe {
                stream
                    .launch_builder(&add)
                    .arg(&mut x)
                    .arg(&1.0f32)
                    .arg(&64u32)
                    .launch(LaunchConfig::for_num_elems(64))
            }
            .unwrap();
            let other = if step % 2 == 0 { &second } else { &first };
            other.join(stream).unwrap();
        }
        assert_eq!(first.clone_dtoh(&x).unwrap(), vec![8.0; 64], "{schedule}");
        first.synchronize().unwrap();
    }
    assert_eq!(gpu.violations(), "");
}

#[test]
fn pinned_memory_is_read_when_the_copy_runs() {
    let gpu = gpu();
    let context = context();
    let stream = context.new_stream().unwrap();
    let mut x = stream.alloc_zeros::<u32>(4).unwrap();
    stream.synchronize().unwrap();
    // SAFETY: the memory is filled before it is read.
    let mut staging = unsafe { context.alloc_pinned_with_flags::<u32>(4, 0) }.unwrap();
    staging.as_mut_slice().unwrap().fill(1);
    stream.memcpy_htod(&staging, &mut x).unwrap();
    staging.as_mut_slice().unwrap().fill(2);
    assert_eq!(
        stream.clone_dtoh(&x).unwrap(),
        [2; 4],
        "reused without a fence"
    );
    stream.synchronize().unwrap();
    drop((x, staging, stream, context));
    assert_eq!(gpu.violations(), "");
}

#[test]
fn injected_failures_and_faults_come_back_as_errors() {
    let gpu = gpu();
    {
        let context = context();
        let stream = context.new_stream().unwrap();
        gpu.fail(
            "cuMemAllocAsync",
            2,
            CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32,
        );
        let kept = stream.alloc_zeros::<f32>(8).unwrap();
        let failed = stream.alloc_zeros::<f32>(8);
        assert_eq!(
            failed.err(),
            Some(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
        );
        assert_eq!(gpu.statistic("injected"), 1);

        let module = context.load_module(Ptx::from_src(ADD)).unwrap();
        let add = module.load_function("add").unwrap();
        // SAFETY: the kernel runs past the end of the memory, which is what this tests.
        unsafe {
            stream
                .launch_builder(&add)
                .arg(&kept)
                .arg(&1.0f32)
                .arg(&64u32)
                .launch(LaunchConfig::for_num_elems(64))
        }
        .unwrap();
        assert_eq!(gpu.violations(), "");
        let illegal = DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert_eq!(stream.synchronize(), Err(illegal));
        assert_eq!(stream.synchronize(), Err(illegal), "the error stays");
        assert!(
            gpu.violations().contains("allocation"),
            "{}",
            gpu.violations()
        );
    }
    // A new context works.
    let context = context();
    context.default_stream().clone_htod(&[1u8]).unwrap();
    context.check_err().unwrap();
}

#[test]
fn leaks_of_a_program_are_reported() {
    let gpu = gpu();
    {
        let context = context();
        let leaked = context.default_stream().alloc_zeros::<f32>(8).unwrap();
        assert_ne!(leaked.leak(), 0);
        let event = context.new_event(None).unwrap();
        let raw = event.cu_event();
        drop(event);
        context.bind_to_thread().unwrap();
        // SAFETY: the handle is looked up, not dereferenced.
        let gone = unsafe { result::event::synchronize(raw) };
        assert_eq!(gone, Err(DriverError(CUresult::CUDA_ERROR_INVALID_HANDLE)));
    }
    let text = gpu.violations();
    assert!(
        text.contains("was an event and has been destroyed"),
        "{text}"
    );
    assert!(!text.contains("leaked: event"), "{text}");
}

/// Code of the process that `settings_come_from_the_environment` starts.
#[test]
#[ignore = "started by another test"]
fn child() {
    // Does not call `gpu()`, so that only the environment counts.
    let path = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .join("libvirtual_gpu.so");
    // SAFETY: loading the library runs no code.
    let _library = unsafe { Library::new(&path) }.unwrap();
    let context = context();
    assert_eq!(context.compute_capability().unwrap(), (8, 9));
    assert_eq!(context.total_mem().unwrap(), 64 << 20);
    let stream = context.default_stream();
    let _kept = stream.alloc_zeros::<u8>(1000).unwrap();
    let failed = stream.alloc_zeros::<u8>(1000);
    assert_eq!(
        failed.err(),
        Some(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
    );
    // SAFETY: the address is looked up, not dereferenced.
    assert!(unsafe { result::free_sync(0x7000_1234_0000) }.is_err());
    std::process::exit(0);
}

#[test]
fn settings_come_from_the_environment() {
    let report = std::env::temp_dir().join(format!("vgpu-report-{}", std::process::id()));
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child"])
        .env("VGPU_COMPUTE_CAPABILITY", "8.9")
        .env("VGPU_MEMORY", "64M")
        .env(
            "VGPU_FAIL",
            "cuMemAllocAsync:2:OUT_OF_MEMORY,cuStreamCreate:9:1:2",
        )
        .env("VGPU_REPORT", &report)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{errors}");
    assert!(errors.contains("violation: cuMemFree_v2"), "{errors}");
    let text = std::fs::read_to_string(&report).unwrap();
    std::fs::remove_file(&report).unwrap();
    for line in [
        "statistic injected 1",
        "call cuMemAllocAsync 2",
        "violation cuMemFree_v2: 0x700012340000 is not an allocation",
        "alive device memory",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn invalid_settings_end_the_process() {
    for (variable, value) in [
        ("VGPU_SCHEDULE", "sideways"),
        ("VGPU_FAIL", "cuMemAlloc:first:2"),
    ] {
        let done = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child"])
            .env(variable, value)
            .output()
            .unwrap();
        assert!(!done.status.success());
        assert!(String::from_utf8_lossy(&done.stderr).contains(variable));
    }
}

/// The functions that cudarc 0.19.10 calls in its `driver` module.
const FUNCTIONS: &str = "
    cuCtxCreate_v3
    cuCtxCreate_v4
    cuCtxDestroy_v2
    cuCtxGetCacheConfig
    cuCtxGetCurrent
    cuCtxGetLimit
    cuCtxGetStreamPriorityRange
    cuCtxSetCacheConfig
    cuCtxSetCurrent
    cuCtxSetFlags
    cuCtxSetLimit
    cuCtxSynchronize
    cuDestroyExternalMemory
    cuDeviceGet
    cuDeviceGetAttribute
    cuDeviceGetCount
    cuDeviceGetDefaultMemPool
    cuDeviceGetMemPool
    cuDeviceGetName
    cuDeviceGetUuid
    cuDeviceGetUuid_v2
    cuDevicePrimaryCtxRelease_v2
    cuDevicePrimaryCtxRetain
    cuDeviceSetMemPool
    cuDeviceTotalMem_v2
    cuEventCreate
    cuEventDestroy_v2
    cuEventElapsedTime
    cuEventElapsedTime_v2
    cuEventQuery
    cuEventRecord
    cuEventSynchronize
    cuExternalMemoryGetMappedBuffer
    cuFuncGetAttribute
    cuFuncSetAttribute
    cuFuncSetCacheConfig
    cuGetErrorName
    cuGetErrorString
    cuGraphClone
    cuGraphDestroy
    cuGraphExecDestroy
    cuGraphInstantiateWithFlags
    cuGraphLaunch
    cuGraphUpload
    cuImportExternalMemory
    cuInit
    cuLaunchCooperativeKernel
    cuLaunchHostFunc
    cuLaunchKernel
    cuMemAdvise_v2
    cuMemAllocAsync
    cuMemAllocFromPoolAsync
    cuMemAllocManaged
    cuMemAlloc_v2
    cuMemFreeAsync
    cuMemFreeHost
    cuMemFree_v2
    cuMemGetInfo_v2
    cuMemHostAlloc
    cuMemPoolCreate
    cuMemPoolDestroy
    cuMemPoolGetAttribute
    cuMemPoolSetAttribute
    cuMemPoolTrimTo
    cuMemPrefetchAsync_v2
    cuMemcpyDtoDAsync_v2
    cuMemcpyDtoD_v2
    cuMemcpyDtoHAsync_v2
    cuMemcpyDtoH_v2
    cuMemcpyHtoDAsync_v2
    cuMemcpyHtoD_v2
    cuMemcpyPeerAsync
    cuMemsetD8Async
    cuMemsetD8_v2
    cuModuleGetFunction
    cuModuleGetGlobal_v2
    cuModuleLoad
    cuModuleLoadData
    cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags
    cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialBlockSize
    cuOccupancyMaxPotentialBlockSizeWithFlags
    cuOccupancyMaxPotentialClusterSize
    cuProfilerStart
    cuProfilerStop
    cuStreamAttachMemAsync
    cuStreamBeginCapture_v2
    cuStreamCreate
    cuStreamCreateWithPriority
    cuStreamDestroy_v2
    cuStreamEndCapture
    cuStreamIsCapturing
    cuStreamSynchronize
    cuStreamWaitEvent
";

#[test]
fn every_function_that_cudarc_calls_exists() {
    let gpu = gpu();
    for name in FUNCTIONS.split_whitespace() {
        // SAFETY: the function is looked up but not called.
        let found = unsafe { gpu.library.get::<unsafe extern "C" fn()>(name.as_bytes()) };
        assert!(found.is_ok(), "{name}");
    }
}

unsafe extern "C" fn count(data: *mut c_void) {
    // SAFETY: `data` points to the number that was passed with the function.
    unsafe { *data.cast::<u32>() += 1 };
}

#[test]
fn raw_calls_work_with_the_structures_of_cudarc() {
    let gpu = gpu();
    {
        let context = context();
        let stream = context.new_stream().unwrap();
        let module = context.load_module(Ptx::from_src(ADD)).unwrap();
        let add = module.load_function("add").unwrap();
        assert_eq!(add.num_regs().unwrap(), 64);
        assert_eq!(
            add.occupancy_max_active_blocks_per_multiprocessor(256, 0, None)
                .unwrap(),
            4
        );
        let x = stream.clone_htod(&[1.0f32; 32]).unwrap();
        let (pointer, y, n) = (x.leak(), 2.0f32, 32u32);
        let mut attribute: sys::CUlaunchAttribute = {
            // SAFETY: all zeros are a valid value of this structure, the attribute to ignore.
            unsafe { std::mem::zeroed() }
        };
        let mut configuration = sys::CUlaunchConfig {
            gridDimX: 1,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 16,
            hStream: stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        let mut parameters = [
            (&raw const pointer).cast_mut().cast(),
            (&raw const y).cast_mut().cast(),
            (&raw const n).cast_mut().cast(),
        ];
        let image = CString::new(ADD).unwrap();
        // SAFETY: the image is a C string; the module is unloaded below.
        let raw = unsafe { result::module::load_data(image.as_ptr().cast()) }.unwrap();
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(raw, c"add".into()) }.unwrap();
        let mut launch = |configuration: &sys::CUlaunchConfig| {
            let none = std::ptr::null_mut();
            // SAFETY: the parameters match those of the kernel.
            unsafe {
                sys::cuLaunchKernelEx(configuration, function, parameters.as_mut_ptr(), none)
                    .result()
            }
        };
        launch(&configuration).unwrap();
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: 2, y: 1, z: 1 };
        configuration.attrs = &mut attribute;
        let refused = DriverError(CUresult::CUDA_ERROR_NOT_SUPPORTED);
        assert_eq!(launch(&configuration), Err(refused));
        // SAFETY: the memory was allocated with this many numbers and is handed over once.
        let x = unsafe { stream.upgrade_device_ptr::<f32>(pointer, 32) };
        assert_eq!(stream.clone_dtoh(&x).unwrap(), [3.0; 32]);

        let mut called = 0u32;
        let data = (&raw mut called).cast();
        // SAFETY: the number lives until the stream has been synchronised.
        unsafe { sys::cuLaunchHostFunc(stream.cu_stream(), Some(count), data).result() }.unwrap();
        stream.synchronize().unwrap();
        assert_eq!(called, 1);
        // SAFETY: nothing uses the module any more.
        unsafe { result::module::unload(raw) }.unwrap();
    }
    assert_eq!(gpu.violations(), "");
}
