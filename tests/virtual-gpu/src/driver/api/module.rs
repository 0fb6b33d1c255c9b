//! Modules and their functions. Only PTX text is accepted, since machine code cannot run here.

use crate::driver::codes::{self, Code};
use crate::driver::launch::{SHARED_DEFAULT, parameter_bytes};
use crate::driver::objects::{Function, Module};
use crate::driver::{Driver, Failure, Need, call};
use crate::ptx;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::Arc;

const ELF: [u8; 4] = *b"\x7fELF";
const FATBIN: [u8; 4] = [0x50, 0xed, 0x55, 0xba];
const FATBIN_WRAPPER: [u8; 4] = [0xb1, 0x43, 0x62, 0x46];

/// Nominal number of registers per thread of every kernel; the virtual GPU does not allocate
/// any.
const REGISTERS: i32 = 64;

/// Returns the rest of the line after a directive: `.version 8.4` gives `8.4`.
fn directive<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.trim_start().strip_prefix(name))
        .map(str::trim)
}

/// Fails if the device or the driver is too old for the PTX text.
fn check_target(driver: &Driver, text: &str) -> Result<(), (Code, String)> {
    let invalid = |text: &str| (codes::INVALID_PTX, text.to_owned());
    let version = directive(text, ".version").and_then(|found| found.split_once('.'));
    let (major, minor) = version.ok_or_else(|| invalid("there is no .version"))?;
    let minor: String = minor.chars().take_while(char::is_ascii_digit).collect();
    let number = |text: &str| {
        text.trim()
            .parse::<u32>()
            .map_err(|_| invalid("the .version is not a number"))
    };
    let version = number(major)? * 10 + number(&minor)?;
    if version > driver.settings.ptx_version() {
        let text = format!(
            "PTX {major}.{minor} is newer than driver {} understands",
            driver.settings.driver
        );
        return Err((codes::UNSUPPORTED_PTX_VERSION, text));
    }
    let target = directive(text, ".target").and_then(|found| found.strip_prefix("sm_"));
    let target = target.ok_or_else(|| invalid("there is no .target sm_..."))?;
    let digits: String = target.chars().take_while(char::is_ascii_digit).collect();
    let wanted: i32 = digits
        .parse()
        .map_err(|_| invalid("the .target is not a number"))?;
    let (major, minor) = driver.settings.capability;
    let device = major * 10 + minor;
    let exact = target[digits.len()..].starts_with('a');
    if wanted > device || (exact && wanted != device) {
        let text = format!(
            "the PTX is for sm_{digits}{}, the device is sm_{device}",
            if exact { "a" } else { "" }
        );
        return Err((codes::INVALID_PTX, text));
    }
    Ok(())
}

/// Returns whether the text declares global variables. Each load of such a module needs its own
/// copies of them.
fn has_variables(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim_start);
    lines.any(|line| {
        let line = [".visible ", ".weak ", ".extern ", ".common "]
            .iter()
            .find_map(|p| line.strip_prefix(p))
            .unwrap_or(line);
        line.starts_with(".global")
    })
}

fn parse(driver: &mut Driver, text: &str) -> Result<Arc<ptx::Module>, (Code, String)> {
    check_target(driver, text)?;
    if let Some(image) = driver.images.get(text) {
        return Ok(Arc::clone(image));
    }
    let image = Arc::new(
        ptx::Module::parse(text).map_err(|error| (codes::INVALID_PTX, error.to_string()))?,
    );
    if !has_variables(text) {
        driver.images.insert(text.to_owned(), Arc::clone(&image));
    }
    Ok(image)
}

fn load(driver: &mut Driver, text: &str, log: &mut String) -> Result<u64, Failure> {
    let context = driver.current()?;
    driver.forbidden_while_capturing()?;
    match parse(driver, text) {
        Ok(image) => Ok(driver.modules.insert(Module {
            context,
            image,
            functions: HashMap::new(),
        })),
        Err((code, why)) => {
            log.clone_from(&why);
            driver.refuse(code, &why)
        }
    }
}

/// Returns the text of an image in memory.
///
/// # Safety
/// `image` must be null, a C string, or an image that begins with 4 readable bytes.
unsafe fn image_text<'a>(driver: &mut Driver, image: *const c_void) -> Result<&'a str, Failure> {
    if image.is_null() {
        return driver.refuse(codes::INVALID_VALUE, "the image is null");
    }
    let mut start = [0; 4];
    for (at, byte) in start.iter_mut().enumerate() {
        // SAFETY: guaranteed by the caller; the loop does not read past the end of a string.
        *byte = unsafe { image.cast::<u8>().add(at).read() };
        if *byte == 0 {
            break;
        }
    }
    if [ELF, FATBIN, FATBIN_WRAPPER].contains(&start) {
        eprintln!("virtual GPU: an image of machine code cannot be loaded, only PTX");
        return Err(Failure(codes::NO_BINARY_FOR_GPU));
    }
    // SAFETY: a C string, as the caller guarantees.
    match unsafe { CStr::from_ptr(image.cast::<c_char>()) }.to_str() {
        Ok(text) => Ok(text),
        Err(_) => driver.refuse(
            codes::INVALID_IMAGE,
            "the image is neither PTX nor machine code",
        ),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut u64, image: *const c_void) -> Code {
    call("cuModuleLoadData", Need::CONTEXT, |driver| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        let text = unsafe { image_text(driver, image) }?;
        let made = load(driver, text, &mut String::new())?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, module, made) }
    })
}

/// Only the options for the error log are supported; the others have no effect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut u64,
    image: *const c_void,
    count: u32,
    options: *const i32,
    values: *const *mut c_void,
) -> Code {
    const ERROR_LOG: i32 = 5;
    const ERROR_LOG_SIZE: i32 = 6;
    call("cuModuleLoadDataEx", Need::CONTEXT, |driver| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        let text = unsafe { image_text(driver, image) }?;
        let mut log = String::new();
        let made = load(driver, text, &mut log);
        let mut room = (std::ptr::null_mut::<u8>(), 0);
        for at in 0..count as usize {
            // SAFETY: both arrays have `count` entries, as the CUDA driver API requires.
            let (option, value) = unsafe { (options.add(at).read(), values.add(at).read()) };
            match option {
                ERROR_LOG => room.0 = value.cast(),
                ERROR_LOG_SIZE => room.1 = value as usize,
                _ => {}
            }
        }
        // SAFETY: the log buffer has the size given in the options, as the CUDA driver API
        // requires.
        unsafe { crate::driver::control::copy_text(&log, room.0.cast(), room.1) };
        let made = made?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, module, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoad(module: *mut u64, path: *const c_char) -> Code {
    call("cuModuleLoad", Need::CONTEXT, |driver| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        let path = unsafe { super::text(driver, path) }?;
        let Ok(text) = std::fs::read_to_string(&path) else {
            return Err(Failure(codes::FILE_NOT_FOUND));
        };
        let made = load(driver, &text, &mut String::new())?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, module, made) }
    })
}

/// Waits for queued launches of the module's kernels, like `cuMemFree_v2`, and reports them as
/// violations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(module: u64) -> Code {
    call("cuModuleUnload", Need::RELEASE, |driver| {
        let context = driver.module(module)?.context;
        driver.forbidden_while_capturing()?;
        driver.report.synchronisations += 1;
        let label = format!("module {module:#x}");
        let of_module = |op: &crate::driver::queue::Op| match op {
            crate::driver::queue::Op::Kernel(launch) => launch.module == module,
            _ => false,
        };
        let users = driver.users(context, &label, of_module);
        let ran = driver.run(context, users);
        driver.modules.remove(module);
        ran
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut u64,
    module: u64,
    name: *const c_char,
) -> Code {
    call("cuModuleGetFunction", Need::CONTEXT, |driver| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        let name = unsafe { super::text(driver, name) }?;
        let found = driver.module(module)?;
        let (context, image) = (found.context, Arc::clone(&found.image));
        let made = match found.functions.get(&name) {
            Some(made) => *made,
            None => {
                let Some(kernel) = image.kernel(&name) else {
                    return Err(Failure(codes::NOT_FOUND));
                };
                let c_name = CString::new(kernel.name.as_str()).unwrap_or_default();
                let object = Function {
                    context,
                    module,
                    image: Arc::clone(&image),
                    name: c_name,
                    dynamic_shared: 0,
                };
                let made = driver.functions.insert(object);
                driver.module_mut(module)?.functions.insert(name, made);
                made
            }
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, function, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunctionCount(count: *mut u32, module: u64) -> Code {
    call("cuModuleGetFunctionCount", Need::CONTEXT, |driver| {
        let value = driver.module(module)?.image.kernels().count() as u32;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, count, value) }
    })
}

/// Always fails: module variables cannot be reached from the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    _address: *mut u64,
    _bytes: *mut usize,
    module: u64,
    _name: *const c_char,
) -> Code {
    call("cuModuleGetGlobal_v2", Need::CONTEXT, |driver| {
        driver.module(module)?;
        Err(Failure(codes::NOT_FOUND))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetLoadingMode(mode: *mut i32) -> Code {
    const EAGER: i32 = 1;
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuModuleGetLoadingMode", Need::INIT, |driver| unsafe {
        super::put(driver, mode, EAGER)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetModule(module: *mut u64, function: u64) -> Code {
    call("cuFuncGetModule", Need::CONTEXT, |driver| {
        let value = driver.kernel(function)?.module;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, module, value) }
    })
}

/// The name lives as long as the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetName(name: *mut *const c_char, function: u64) -> Code {
    call("cuFuncGetName", Need::CONTEXT, |driver| {
        let value = driver.kernel(function)?.name.as_ptr();
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, name, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetParamInfo(
    function: u64,
    index: usize,
    offset: *mut usize,
    size: *mut usize,
) -> Code {
    call("cuFuncGetParamInfo", Need::CONTEXT, |driver| {
        let parameters = driver
            .kernel(function)?
            .kernel()
            .map_or(&[][..], |kernel| &kernel.parameters);
        // Callers probe past the last parameter to find the end, so this is not a violation.
        let Some((at, bytes)) = parameters.get(index).map(|p| (p.offset, p.size)) else {
            return Err(Failure(codes::INVALID_VALUE));
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            super::put_optional(size, bytes);
            super::put(driver, offset, at)
        }
    })
}

/// The number of registers is nominal: the virtual GPU does not allocate any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut i32,
    attribute: i32,
    function: u64,
) -> Code {
    call("cuFuncGetAttribute", Need::CONTEXT, |driver| {
        let (major, minor) = driver.settings.capability;
        let found = driver.kernel(function)?;
        let dynamic = found.dynamic_shared;
        let shared = found.kernel().map_or(0, |kernel| kernel.static_shared);
        let local = found.kernel().map_or(0, ptx::Kernel::local_bytes);
        let threads = found
            .kernel()
            .and_then(ptx::Kernel::max_threads)
            .unwrap_or(1024);
        let number = match attribute {
            0 => threads as usize,
            1 => shared,
            2 => 0,
            3 => local,
            4 => REGISTERS as usize,
            5 | 6 => (major * 10 + minor) as usize,
            7 => 0,
            8 if dynamic > 0 => dynamic,
            8 => SHARED_DEFAULT.saturating_sub(shared),
            9..=15 => 0,
            _ => {
                return driver.refuse(
                    codes::INVALID_VALUE,
                    &format!("unknown function attribute {attribute}"),
                );
            }
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, value, i32::try_from(number).unwrap_or(i32::MAX)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetAttribute(function: u64, attribute: i32, value: i32) -> Code {
    const DYNAMIC_SHARED: i32 = 8;
    const CARVEOUT: i32 = 9;
    call("cuFuncSetAttribute", Need::CONTEXT, |driver| {
        let most = driver.settings.shared_optin();
        let found = driver.kernel(function)?;
        let fixed = found.kernel().map_or(0, |kernel| kernel.static_shared);
        match (attribute, usize::try_from(value)) {
            (DYNAMIC_SHARED, Ok(bytes)) if bytes + fixed <= most => {
                found.dynamic_shared = bytes;
                Ok(())
            }
            (DYNAMIC_SHARED, _) => {
                let text = format!(
                    "{}: {value} bytes of dynamic and {fixed} of static shared memory; the device has {most}",
                    found.name()
                );
                driver.refuse(codes::INVALID_VALUE, &text)
            }
            (CARVEOUT, _) if (-1..=100).contains(&value) => Ok(()),
            _ => driver.refuse(
                codes::INVALID_VALUE,
                &format!("function attribute {attribute} cannot be {value}"),
            ),
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetCacheConfig(function: u64, config: i32) -> Code {
    call("cuFuncSetCacheConfig", Need::CONTEXT, |driver| {
        driver.kernel(function)?;
        match config {
            0..=3 => Ok(()),
            _ => driver.refuse(
                codes::INVALID_VALUE,
                &format!("unknown cache configuration {config}"),
            ),
        }
    })
}

/// Returns how many blocks of a function fit on a multiprocessor, given its threads, shared
/// memory and nominal registers.
fn occupancy(
    driver: &mut Driver,
    function: u64,
    block: i32,
    dynamic: usize,
) -> Result<i32, Failure> {
    let (threads, blocks) = (
        driver.settings.threads_per_multiprocessor(),
        driver.settings.blocks_per_multiprocessor(),
    );
    let shared = driver.settings.shared_per_multiprocessor();
    let found = driver.kernel(function)?;
    let fixed = found.kernel().map_or(0, |kernel| kernel.static_shared);
    let allowed = found
        .dynamic_shared
        .max(SHARED_DEFAULT.saturating_sub(fixed));
    if block < 1 {
        return driver.refuse(codes::INVALID_VALUE, &format!("a block of {block} threads"));
    }
    if block > 1024 || dynamic > allowed {
        return Ok(0);
    }
    let rounded = (block + 31) / 32 * 32;
    let by_shared = shared / (fixed + dynamic + 1024);
    let by_registers = 65536 / (rounded * REGISTERS);
    Ok(blocks
        .min(threads / rounded)
        .min(by_registers)
        .min(i32::try_from(by_shared).unwrap_or(i32::MAX)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    count: *mut i32,
    function: u64,
    block: i32,
    dynamic: usize,
) -> Code {
    call(
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        Need::CONTEXT,
        |driver| {
            let value = occupancy(driver, function, block, dynamic)?;
            // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
            unsafe { super::put(driver, count, value) }
        },
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    count: *mut i32,
    function: u64,
    block: i32,
    dynamic: usize,
    _flags: u32,
) -> Code {
    call(
        "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
        Need::CONTEXT,
        |driver| {
            let value = occupancy(driver, function, block, dynamic)?;
            // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
            unsafe { super::put(driver, count, value) }
        },
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyAvailableDynamicSMemPerBlock(
    bytes: *mut usize,
    function: u64,
    blocks: i32,
    block: i32,
) -> Code {
    call(
        "cuOccupancyAvailableDynamicSMemPerBlock",
        Need::CONTEXT,
        |driver| {
            let shared = driver.settings.shared_per_multiprocessor();
            let most = driver.settings.shared_optin();
            let fixed = driver
                .kernel(function)?
                .kernel()
                .map_or(0, |kernel| kernel.static_shared);
            let Some(share) = usize::try_from(blocks)
                .ok()
                .and_then(|blocks| shared.checked_div(blocks))
            else {
                return driver.refuse(
                    codes::INVALID_VALUE,
                    &format!("{blocks} blocks of {block} threads"),
                );
            };
            // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
            unsafe {
                super::put(
                    driver,
                    bytes,
                    share
                        .saturating_sub(1024 + fixed)
                        .min(most.saturating_sub(fixed)),
                )
            }
        },
    )
}

/// `CUoccupancyB2DSize`.
type BlockToShared = Option<unsafe extern "C" fn(i32) -> usize>;

/// # Safety
/// The pointers must be valid; see the [parent module](super).
unsafe fn potential(
    driver: &mut Driver,
    grid: *mut i32,
    block: *mut i32,
    function: u64,
    (shared, dynamic): (BlockToShared, usize),
    limit: i32,
) -> Result<(), Failure> {
    let mut best = (0, 0, 0);
    let most = if limit > 0 { limit.min(1024) } else { 1024 };
    for size in (1..=most / 32).rev().map(|warps| warps * 32) {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        let bytes = shared.map_or(dynamic, |shared| unsafe { shared(size) });
        let blocks = occupancy(driver, function, size, bytes)?;
        if blocks * size > best.0 {
            best = (blocks * size, size, blocks);
        }
    }
    let multiprocessors = driver.settings.multiprocessors;
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe {
        super::put(driver, grid, best.2 * multiprocessors)?;
        super::put(driver, block, best.1)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSize(
    grid: *mut i32,
    block: *mut i32,
    function: u64,
    shared: BlockToShared,
    dynamic: usize,
    limit: i32,
) -> Code {
    call(
        "cuOccupancyMaxPotentialBlockSize",
        Need::CONTEXT,
        |driver| {
            // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
            unsafe { potential(driver, grid, block, function, (shared, dynamic), limit) }
        },
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSizeWithFlags(
    grid: *mut i32,
    block: *mut i32,
    function: u64,
    shared: BlockToShared,
    dynamic: usize,
    limit: i32,
    _flags: u32,
) -> Code {
    call(
        "cuOccupancyMaxPotentialBlockSizeWithFlags",
        Need::CONTEXT,
        |driver| {
            // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
            unsafe { potential(driver, grid, block, function, (shared, dynamic), limit) }
        },
    )
}

/// Returns the size in bytes of all parameters of a function, for launches that pass a
/// parameter buffer.
pub(super) fn buffer_bytes(driver: &mut Driver, function: u64) -> Result<usize, Failure> {
    Ok(driver.kernel(function)?.kernel().map_or(0, parameter_bytes))
}
