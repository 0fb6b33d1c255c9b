//! Kernel launches: their parameters as bytes, their limits, and running them.

use super::counted::Counted;
use super::objects::Function;
use super::queue::NodeId;
use super::settings::{Schedule, Settings};
use crate::ptx::{self, Kernel, Launch};
use std::ffi::c_void;
use std::sync::Arc;

/// Bytes of shared memory that a kernel may use without opting in.
pub const SHARED_DEFAULT: usize = 48 << 10;
const MAX_THREADS: u64 = 1024;
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];

/// A launch with everything that it needs, so that it does not depend on the module's handle.
pub struct KernelLaunch {
    /// Handle of the module that contains the kernel, or 0 if a library contains it.
    pub module: u64,
    image: Arc<ptx::Module>,
    name: String,
    launch: Launch,
    /// Whether the kernel may begin while the one before it still runs.
    pub overlaps: bool,
}

impl KernelLaunch {
    /// Checks and creates a launch.
    ///
    /// # Errors
    /// Returns a description of what is wrong with the launch.
    pub fn new(function: &Function, launch: Launch, most_shared: usize) -> Result<Self, String> {
        let name = function.name().to_owned();
        let kernel = function.kernel().ok_or("the kernel is gone")?;
        check_size("grid", launch.grid, MAX_GRID)?;
        check_size("block", launch.block, MAX_BLOCK)?;
        let threads: u64 = launch.block.iter().map(|n| u64::from(*n)).product();
        if threads > MAX_THREADS {
            return Err(format!(
                "{name}: a block of {threads} threads; the maximum is {MAX_THREADS}"
            ));
        }
        let dynamic = launch.dynamic_shared;
        let allowed = function
            .dynamic_shared
            .max(SHARED_DEFAULT.saturating_sub(kernel.static_shared));
        if dynamic > allowed {
            return Err(format!(
                "{name}: {dynamic} bytes of dynamic shared memory; {allowed} are allowed \
                 (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES raises that)"
            ));
        }
        let shared = dynamic + kernel.static_shared;
        if shared > most_shared {
            return Err(format!(
                "{name}: {shared} bytes of shared memory; the device has {most_shared}"
            ));
        }
        Ok(Self {
            module: function.module,
            image: Arc::clone(&function.image),
            name,
            launch,
            overlaps: false,
        })
    }

    /// Returns the kernel's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Describes what the launch did.
    pub fn counted(&self, ran: ptx::Statistics) -> Counted {
        let kernel = self.image.kernel(&self.name);
        let declared = kernel.map_or(0, |kernel| kernel.static_shared);
        Counted::new(&self.name, &self.launch, declared, ran)
    }

    /// Iterates over the parameters that can be device pointers, with index and value.
    pub fn pointers(&self) -> impl Iterator<Item = (usize, u64)> {
        let parameters = self
            .image
            .kernel(&self.name)
            .map_or(&[][..], |kernel| &kernel.parameters);
        parameters
            .iter()
            .enumerate()
            .flat_map(move |(index, parameter)| {
                let bytes = self
                    .launch
                    .parameters
                    .get(parameter.offset..parameter.offset + parameter.size);
                let words = bytes.unwrap_or_default().chunks_exact(8);
                words.filter_map(move |word| {
                    let value = u64::from_le_bytes(word.try_into().ok()?);
                    (super::memory::FIRST_ADDRESS..super::memory::LAST_ADDRESS)
                        .contains(&value)
                        .then_some((index, value))
                })
            })
    }

    /// Runs the kernel on the memory that it may access. `before` is a kernel that may still run
    /// when this one, the node `id`, begins.
    ///
    /// # Errors
    /// Returns the kind of the fault and its report.
    pub fn run(
        &self,
        regions: &[ptx::Region],
        settings: &Settings,
        (id, before): (NodeId, Option<NodeId>),
    ) -> Result<ptx::Statistics, (ptx::FaultKind, String)> {
        let options = ptx::Options {
            threads: settings.threads,
            check_races: settings.check_races,
            check_initialised: settings.check_initialised,
            shuffle_seed: match settings.schedule {
                Schedule::Shuffle(seed) => Some(seed ^ id.rotate_left(32)),
                Schedule::Eager | Schedule::Late => None,
            },
            count: settings.count,
            // Where no kernels overlap, nothing needs to be marked.
            number: if settings.overlaps() { number(id) } else { 0 },
            overlaps: before.map(number),
        };
        match self.image.kernel(&self.name) {
            Some(kernel) => ptx::run(kernel, &self.launch, &ptx::Regions(regions), &options)
                .map_err(|fault| (fault.kind, fault.to_string())),
            None => Ok(ptx::Statistics::default()),
        }
    }
}

/// Returns the number with which the memory is marked that a kernel writes to.
fn number(id: NodeId) -> u32 {
    (id % u64::from(u32::MAX)) as u32 + 1
}

fn check_size(what: &str, size: [u32; 3], most: [u32; 3]) -> Result<(), String> {
    let [x, y, z] = size;
    if size.contains(&0) {
        return Err(format!("the {what} ({x}, {y}, {z}) has a dimension of 0"));
    }
    let [mx, my, mz] = most;
    if size.iter().zip(most).any(|(have, most)| *have > most) {
        return Err(format!(
            "the {what} ({x}, {y}, {z}) is larger than ({mx}, {my}, {mz})"
        ));
    }
    Ok(())
}

/// Returns the size in bytes of a kernel's parameters.
pub fn parameter_bytes(kernel: &Kernel) -> usize {
    kernel
        .parameters
        .iter()
        .map(|parameter| parameter.offset + parameter.size)
        .max()
        .unwrap_or(0)
}

/// Copies the parameters that an array of pointers refers to.
///
/// # Errors
/// Returns a description if a pointer is null.
///
/// # Safety
/// `pointers` must be null or have an entry for each parameter of the kernel. Each entry must
/// be null or readable for the size of its parameter.
pub unsafe fn gather_parameters(
    kernel: &Kernel,
    pointers: *const *mut c_void,
) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; parameter_bytes(kernel)];
    if kernel.parameters.is_empty() {
        return Ok(bytes);
    }
    if pointers.is_null() {
        let count = kernel.parameters.len();
        return Err(format!(
            "{}: no parameters are passed; the kernel has {count}",
            kernel.name
        ));
    }
    for (index, parameter) in kernel.parameters.iter().enumerate() {
        // SAFETY: guaranteed by the caller.
        let from = unsafe { *pointers.add(index) };
        if from.is_null() {
            return Err(format!(
                "{}: parameter {index} is passed as null",
                kernel.name
            ));
        }
        let to = &mut bytes[parameter.offset..parameter.offset + parameter.size];
        // SAFETY: guaranteed by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.as_mut_ptr(), to.len()) };
    }
    Ok(bytes)
}
