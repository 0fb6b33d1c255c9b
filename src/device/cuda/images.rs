//! Kernel images: finds and loads the embedded image that fits the device.

use super::context::Context;
use super::error;
use super::handle::Handle;
use super::options::CudaActivations;
use super::overlap;
use super::signature::{ParameterKind, Signature};
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::rc::Rc;

// `PORTABLE` and `NATIVE`, written by build.rs.
include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Targets of the portable images. Every later GPU can run them, and those with the instructions
/// of `overlap` run an image with these.
const PORTABLE_TARGET: &str = "compute_80";
const NEWER_TARGET: &str = "compute_90";

/// A loaded kernel image.
pub(super) struct Module {
    module: sys::CUmodule,
    /// The portable image of the same file, which declares the kernels' parameters.
    ptx: &'static str,
    handle: Rc<Handle>,
}

impl Module {
    /// Returns the function of kernel `name`, which is one of `signatures`. Fails if the image
    /// lacks the kernel or declares other parameters for it. The function is valid as long as
    /// the module.
    pub(super) fn function(
        &self,
        name: &'static str,
        signatures: &[Signature],
    ) -> Result<sys::CUfunction, DeviceError> {
        const OPERATION: &str = "loading the kernels";
        let parameters = parameters(self.ptx, name)
            .ok_or_else(|| error::failed(OPERATION, format!("the image has no kernel {name}")))?;
        let declared = signatures.iter().find(|signature| signature.name == name);
        let declared: Vec<ParameterKind> = declared
            .map(|signature| signature.parameters.iter().map(|(_, kind)| *kind).collect())
            .unwrap_or_default();
        error::require(parameters == declared, OPERATION, || {
            format!("the image's {name} takes {parameters:?}, but {declared:?} is declared")
        })?;
        let entry = CString::new(name)
            .map_err(|_| error::failed(OPERATION, format!("{name} is not a kernel name")))?;
        // SAFETY: the module is loaded.
        let find = || unsafe { result::module::get_function(self.module, entry) };
        self.handle.call(OPERATION, find)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let handle = &self.handle;
        handle.drain();
        // SAFETY: the module was loaded by `Modules`, is unloaded once, and none of its kernels
        // runs after the wait above.
        let unload = || unsafe { result::module::unload(self.module) };
        handle.cleanup("unloading kernels", unload);
    }
}

/// Returns the parameter kinds of the kernel `entry` in a PTX text, or `None` if there is no
/// such kernel or a parameter is of an unknown kind.
pub(super) fn parameters(ptx: &str, entry: &str) -> Option<Vec<ParameterKind>> {
    let list = ptx.split(".entry").skip(1).find_map(|rest| {
        let rest = rest.trim_start().strip_prefix(entry)?.trim_start();
        rest.strip_prefix('(')?
            .split_once(')')
            .map(|(list, _)| list)
    })?;
    let kind = |parameter: &str| {
        parameter.split_whitespace().find_map(|word| match word {
            ".u64" | ".b64" => Some(ParameterKind::Pointer),
            ".u32" | ".b32" => Some(ParameterKind::Unsigned),
            ".f32" => Some(ParameterKind::Float),
            _ => None,
        })
    };
    let list = list.trim();
    if list.is_empty() {
        return Some(Vec::new());
    }
    list.split(',').map(kind).collect()
}

/// The kernel images of one device, each loaded on first use.
pub(super) struct Modules {
    handle: Rc<Handle>,
    /// The activation type, `bf16` or `f16`.
    activations: &'static str,
    /// Compute capability times ten: 90 is 9.0.
    capability: u32,
    loaded: RefCell<HashMap<&'static str, Rc<Module>>>,
}

impl Modules {
    /// Creates the images for a device of compute capability `capability`, where 90 is 9.0.
    pub(super) fn new(context: &Context, activations: CudaActivations, capability: u32) -> Self {
        Self {
            handle: Rc::clone(&context.handle),
            activations: activations.name(),
            capability,
            loaded: RefCell::default(),
        }
    }

    /// Returns the file's machine code for exactly this compute capability, if it is embedded.
    fn native(&self, file: &str) -> Option<&'static [u8]> {
        let key = (file, self.activations, self.capability);
        let mut images = NATIVE.iter();
        images.find_map(|&(name, activations, capability, bytes)| {
            ((name, activations, capability) == key).then_some(bytes)
        })
    }

    /// Describes, for people, whether the kernels run as machine code or as PTX.
    pub(super) fn description(&self) -> String {
        match PORTABLE.iter().find_map(|(file, ..)| self.native(file)) {
            Some(_) => format!("machine code for sm_{}", self.capability),
            None => {
                let newer = self.capability >= overlap::CAPABILITY;
                let target = if newer { NEWER_TARGET } else { PORTABLE_TARGET };
                format!("PTX {target}, compiled by the driver")
            }
        }
    }

    /// Returns the image of `kernels/FILE.cu`, which is loaded on first use.
    pub(super) fn file(&self, file: &'static str) -> Result<Rc<Module>, DeviceError> {
        const OPERATION: &str = "loading the kernels";
        if let Some(module) = self.loaded.borrow().get(file) {
            return Ok(Rc::clone(module));
        }
        let missing = || {
            let activations = self.activations;
            error::failed(
                OPERATION,
                format!("this build of quell has no image of {file} for {activations}"),
            )
        };
        let portable = portable(file, self.activations).ok_or_else(missing)?;
        let text = portable.strip_suffix(&[0]).ok_or_else(missing)?;
        let ptx = std::str::from_utf8(text).map_err(|_| missing())?;
        let newer = match self.native(file) {
            None if self.capability >= overlap::CAPABILITY => {
                Some(overlap::with_newer_instructions(ptx) + "\0")
            }
            _ => None,
        };
        let image = match &newer {
            Some(image) => image.as_bytes(),
            None => self.native(file).unwrap_or(portable),
        };
        // SAFETY: machine code carries its size, and a portable image ends with a zero byte: it was
        // checked or appended above. The driver does not refer to it after the call.
        let load = || unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = Rc::new(Module {
            module: self.handle.call(OPERATION, load)?,
            ptx,
            handle: Rc::clone(&self.handle),
        });
        self.loaded.borrow_mut().insert(file, Rc::clone(&module));
        Ok(module)
    }
}

/// Returns the portable image of a file, if it is embedded.
pub(super) fn portable(file: &str, activations: &str) -> Option<&'static [u8]> {
    let mut images = PORTABLE.iter();
    images.find_map(|&(name, of, bytes)| ((name, of) == (file, activations)).then_some(bytes))
}
