//! A stand-in for cuBLASLt: the few functions that multiply a transposed matrix by another, on
//! the virtual GPU. A link to this library with the name of cuBLASLt makes a program find it.
//!
//! # Safety
//! As described by cuBLASLt: a pointer that is not null must be valid for what the function
//! reads or writes through it. Handles may have any value, since they are looked up.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use crate::driver::codes::Code;
use crate::driver::launch::KernelLaunch;
use crate::driver::objects::Function;
use crate::driver::queue::Op;
use crate::driver::{Driver, Failure, Need, call, current_context};
use crate::ptx::{Launch, Module};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const INVALID_VALUE: Code = 7;
const NOT_SUPPORTED: Code = 15;

const FLOAT32: i32 = 0;
const FLOAT16: i32 = 2;
const BFLOAT16: i32 = 14;

/// Threads per block.
const THREADS: u32 = 128;

/// What a handle stands for.
#[derive(Clone, Copy, Debug)]
enum Object {
    Instance,
    Product { transposes_first: bool },
    Layout(Layout),
    Preference,
}

/// A column-major matrix.
#[derive(Clone, Copy, Debug)]
struct Layout {
    kind: i32,
    rows: u64,
    columns: u64,
    stride: i64,
}

/// The live objects by handle.
static OBJECTS: Mutex<BTreeMap<usize, Object>> = Mutex::new(BTreeMap::new());

fn objects<T>(body: impl FnOnce(&mut BTreeMap<usize, Object>) -> T) -> T {
    body(&mut OBJECTS.lock().unwrap_or_else(PoisonError::into_inner))
}

fn refuse<T>(driver: &mut Driver, code: Code, text: &str) -> Result<T, Failure> {
    driver.violation(text);
    Err(Failure(code))
}

/// Adds an object and stores its handle.
///
/// # Safety
/// `to` must be null or valid for writing.
unsafe fn create(driver: &mut Driver, to: *mut usize, object: Object) -> Result<(), Failure> {
    static NEXT: Mutex<usize> = Mutex::new(0);
    if to.is_null() {
        return refuse(driver, INVALID_VALUE, "the pointer for the result is null");
    }
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    *next += 64;
    objects(|objects| objects.insert(*next, object));
    // SAFETY: not null, and valid as the caller guarantees.
    unsafe { to.write(*next) };
    Ok(())
}

fn destroy(driver: &mut Driver, handle: usize) -> Result<(), Failure> {
    match objects(|objects| objects.remove(&handle)) {
        Some(_) => Ok(()),
        None => refuse(driver, INVALID_VALUE, "there is no such object to destroy"),
    }
}

fn find(driver: &mut Driver, handle: usize) -> Result<Object, Failure> {
    match objects(|objects| objects.get(&handle).copied()) {
        Some(object) => Ok(object),
        None => refuse(driver, INVALID_VALUE, "a handle is not that of an object"),
    }
}

fn layout(driver: &mut Driver, handle: usize) -> Result<Layout, Failure> {
    match find(driver, handle)? {
        Object::Layout(layout) => Ok(layout),
        other => refuse(driver, INVALID_VALUE, &format!("{other:?} is not a layout")),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(handle: *mut usize) -> Code {
    call("cublasLtCreate", Need::CONTEXT, |driver| {
        // SAFETY: guaranteed by the caller.
        unsafe { create(driver, handle, Object::Instance) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtDestroy(handle: usize) -> Code {
    call("cublasLtDestroy", Need::RELEASE, |driver| {
        destroy(driver, handle)?;
        let left = objects(|objects| {
            let instances = objects.values().any(|o| matches!(o, Object::Instance));
            if instances { 0 } else { objects.len() }
        });
        if left > 0 {
            driver.violation(&format!("leaked: {left} descriptors"));
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(
    product: *mut usize,
    compute: i32,
    scale: i32,
) -> Code {
    const COMPUTE_FLOAT32: i32 = 68;
    call("cublasLtMatmulDescCreate", Need::INIT, |driver| {
        if (compute, scale) != (COMPUTE_FLOAT32, FLOAT32) {
            return Err(Failure(NOT_SUPPORTED));
        }
        let object = Object::Product {
            transposes_first: false,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { create(driver, product, object) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    product: usize,
    attribute: i32,
    value: *const i32,
    size: usize,
) -> Code {
    const TRANSA: i32 = 3;
    call("cublasLtMatmulDescSetAttribute", Need::INIT, |driver| {
        if attribute != TRANSA || size != size_of::<i32>() || value.is_null() {
            return Err(Failure(NOT_SUPPORTED));
        }
        find(driver, product)?;
        // SAFETY: not null, and of this size.
        let transposes_first = unsafe { value.read() } == 1;
        objects(|objects| objects.insert(product, Object::Product { transposes_first }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulDescDestroy(product: usize) -> Code {
    call("cublasLtMatmulDescDestroy", Need::INIT_RELEASE, |driver| {
        destroy(driver, product)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    to: *mut usize,
    kind: i32,
    rows: u64,
    columns: u64,
    stride: i64,
) -> Code {
    call("cublasLtMatrixLayoutCreate", Need::INIT, |driver| {
        let layout = Layout {
            kind,
            rows,
            columns,
            stride,
        };
        // SAFETY: guaranteed by the caller.
        unsafe { create(driver, to, Object::Layout(layout)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatrixLayoutDestroy(layout: usize) -> Code {
    call(
        "cublasLtMatrixLayoutDestroy",
        Need::INIT_RELEASE,
        |driver| destroy(driver, layout),
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(preference: *mut usize) -> Code {
    call("cublasLtMatmulPreferenceCreate", Need::INIT, |driver| {
        // SAFETY: guaranteed by the caller.
        unsafe { create(driver, preference, Object::Preference) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: usize,
    attribute: i32,
    value: *const usize,
    size: usize,
) -> Code {
    // The stand-in needs no workspace.
    const MAX_WORKSPACE_BYTES: i32 = 1;
    const NAME: &str = "cublasLtMatmulPreferenceSetAttribute";
    call(NAME, Need::INIT, |driver| {
        let known = attribute == MAX_WORKSPACE_BYTES && size == size_of::<usize>();
        if !known || value.is_null() {
            return Err(Failure(NOT_SUPPORTED));
        }
        find(driver, preference).map(drop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulPreferenceDestroy(preference: usize) -> Code {
    const NAME: &str = "cublasLtMatmulPreferenceDestroy";
    call(NAME, Need::INIT_RELEASE, |driver| {
        destroy(driver, preference)
    })
}

/// Dimensions of a product that is supported.
struct Product {
    rows: u64,
    outputs: u64,
    inputs: u64,
    stride: u64,
    float16: bool,
    full: bool,
}

impl Product {
    /// Checks the descriptors of `D = Aᵀ B`, where A and B have no gaps between their columns.
    fn new(driver: &mut Driver, product: usize, [a, b, c, d]: [usize; 4]) -> Result<Self, Failure> {
        let found = find(driver, product)?;
        let [a, b] = [layout(driver, a)?, layout(driver, b)?];
        let [c, d] = [layout(driver, c)?, layout(driver, d)?];
        let fits = a.rows == b.rows && (a.columns, b.columns) == (d.rows, d.columns);
        if !fits || (c.rows, c.columns, c.stride) != (d.rows, d.columns, d.stride) {
            let text = format!("the matrices do not fit: {a:?}, {b:?}, {c:?}, {d:?}");
            return refuse(driver, INVALID_VALUE, &text);
        }
        let dense = [a, b].iter().all(|m| m.stride == m.rows as i64);
        let transposed = matches!(
            found,
            Object::Product {
                transposes_first: true
            }
        );
        let inputs = [FLOAT16, BFLOAT16].contains(&a.kind) && a.kind == b.kind;
        let result = [FLOAT32, a.kind].contains(&d.kind) && c.kind == d.kind;
        if !(dense && transposed && inputs && result && d.stride >= d.rows as i64) {
            return Err(Failure(NOT_SUPPORTED));
        }
        Ok(Self {
            rows: d.columns,
            outputs: d.rows,
            inputs: a.rows,
            stride: d.stride.unsigned_abs(),
            float16: a.kind == FLOAT16,
            full: d.kind == FLOAT32,
        })
    }
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
pub struct Proposal {
    algorithm: [u64; 8],
    workspace: usize,
    state: Code,
    waves: f32,
    reserved: [i32; 4],
}

/// Marks an algorithm as one that was proposed here.
const ALGORITHM: u64 = 0x7175_656c_6c00_0001;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    instance: usize,
    product: usize,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    preference: usize,
    wanted: i32,
    proposals: *mut Proposal,
    count: *mut i32,
) -> Code {
    const NAME: &str = "cublasLtMatmulAlgoGetHeuristic";
    call(NAME, Need::CONTEXT, |driver| {
        find(driver, instance)?;
        find(driver, preference)?;
        Product::new(driver, product, [a, b, c, d])?;
        if wanted < 1 || proposals.is_null() || count.is_null() {
            return refuse(driver, INVALID_VALUE, "there is no room for a result");
        }
        let proposal = Proposal {
            algorithm: [ALGORITHM, 0, 0, 0, 0, 0, 0, 0],
            workspace: 0,
            state: 0,
            waves: 1.0,
            reserved: [0; 4],
        };
        // SAFETY: not null, and valid as the caller guarantees.
        unsafe {
            proposals.write(proposal);
            count.write(1);
        }
        Ok(())
    })
}

/// Returns the kernel, as a function of the current context.
fn kernel() -> Result<Function, String> {
    static IMAGE: OnceLock<Result<Arc<Module>, String>> = OnceLock::new();
    let parse = || match Module::parse(include_str!("cublaslt.ptx")) {
        Ok(image) => Ok(Arc::new(image)),
        Err(error) => Err(error.to_string()),
    };
    Ok(Function {
        context: current_context(),
        module: 0,
        image: IMAGE.get_or_init(parse).clone()?,
        name: c"product".to_owned(),
        dynamic_shared: 0,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    instance: usize,
    product: usize,
    alpha: *const f32,
    a: u64,
    a_layout: usize,
    b: u64,
    b_layout: usize,
    beta: *const f32,
    _c: u64,
    c_layout: usize,
    d: u64,
    d_layout: usize,
    algorithm: *const u64,
    _workspace: u64,
    _workspace_size: usize,
    stream: u64,
) -> Code {
    call("cublasLtMatmul", Need::CONTEXT, |driver| {
        find(driver, instance)?;
        let layouts = [a_layout, b_layout, c_layout, d_layout];
        let product = Product::new(driver, product, layouts)?;
        if alpha.is_null() || beta.is_null() || algorithm.is_null() {
            return refuse(driver, INVALID_VALUE, "a pointer is null");
        }
        // SAFETY: not null, and valid as the caller guarantees.
        let (alpha, beta, algorithm) = unsafe { (*alpha, *beta, *algorithm) };
        if (alpha, beta) != (1.0, 0.0) {
            return Err(Failure(NOT_SUPPORTED));
        }
        if algorithm != ALGORITHM {
            return refuse(driver, INVALID_VALUE, "the algorithm was not proposed");
        }
        let stream = driver.resolve_stream(stream)?;
        let mut parameters = Vec::new();
        for pointer in [d, a, b] {
            parameters.extend(pointer.to_le_bytes());
        }
        let Product {
            rows,
            outputs,
            inputs,
            stride,
            ..
        } = product;
        let flags = [product.float16.into(), product.full.into()];
        for number in [rows, outputs, inputs, stride].into_iter().chain(flags) {
            parameters.extend((number as u32).to_le_bytes());
        }
        let launch = Launch {
            grid: [(rows * outputs).div_ceil(THREADS.into()) as u32, 1, 1],
            block: [THREADS, 1, 1],
            dynamic_shared: 0,
            parameters,
        };
        let most_shared = driver.settings.shared_optin();
        let made = kernel().and_then(|kernel| KernelLaunch::new(&kernel, launch, most_shared));
        match made {
            Ok(launch) => driver.submit(stream, Op::Kernel(Arc::new(launch))),
            Err(text) => refuse(driver, INVALID_VALUE, &text),
        }
    })
}
