//! The virtual GPU, and the functions by which it counts launches.

use libloading::Library;
use serde_json::Value;
use std::error::Error;
use std::ffi::{CString, c_char};

/// Device name of the virtual GPU.
pub const NAME: &str = "quell virtual GPU";

/// The loaded virtual GPU. The CUDA device uses it instead of a driver.
pub struct VirtualGpu(Library);

impl VirtualGpu {
    /// Loads the library. It must be loaded before the driver is looked up.
    pub fn load() -> Result<Self, Box<dyn Error>> {
        // Cargo puts the dev-dependency next to the bench's executable.
        let path = std::env::current_exe()?.with_file_name("libvirtual_gpu.so");
        // SAFETY: the library's initialisation does nothing.
        let library = unsafe { Library::new(&path) };
        Ok(Self(
            library.map_err(|error| format!("{}: {error}", path.display()))?,
        ))
    }

    fn symbol<F: Copy>(&self, name: &str) -> Result<F, Box<dyn Error>> {
        // SAFETY: the callers name the functions and their types as the library declares them.
        Ok(unsafe { *self.0.get::<F>(name.as_bytes())? })
    }

    /// Changes a setting.
    pub fn set(&self, key: &str, value: &str) -> Result<(), Box<dyn Error>> {
        type Function = unsafe extern "C" fn(*const c_char, *const c_char) -> i32;
        let set = self.symbol::<Function>("vgpu_set")?;
        let (name, text) = (CString::new(key)?, CString::new(value)?);
        // SAFETY: both are C strings.
        match unsafe { set(name.as_ptr(), text.as_ptr()) } {
            0 => Ok(()),
            _ => Err(format!("the virtual GPU refuses {key} = {value}").into()),
        }
    }

    /// Returns the launches that were counted, and forgets them.
    pub fn take_launches(&self) -> Result<Vec<Value>, Box<dyn Error>> {
        type Function = unsafe extern "C" fn(*mut c_char, usize) -> usize;
        let launches = self.symbol::<Function>("vgpu_launches")?;
        // SAFETY: the buffer may be null.
        let len = unsafe { launches(std::ptr::null_mut(), 0) };
        let mut buffer = vec![0u8; len + 1];
        // SAFETY: the buffer has the length that is passed.
        unsafe { launches(buffer.as_mut_ptr().cast(), buffer.len()) };
        let forget = self.symbol::<unsafe extern "C" fn()>("vgpu_forget_launches")?;
        // SAFETY: the library declares the function with this type.
        unsafe { forget() };
        let text = std::str::from_utf8(&buffer[..len])?;
        let launches = text.lines().map(serde_json::from_str);
        Ok(launches.collect::<Result<_, _>>()?)
    }
}
