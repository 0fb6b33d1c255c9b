//! Counts instructions and their accesses to memory, before they are executed: an instruction
//! may overwrite the registers with its own addresses.

use super::Block;
use super::memory::Addresses;
use super::warp::{Warp, set};
use crate::ptx::count::Way;
use crate::ptx::instruction::{Access, Action, Instruction, LANES};
use crate::ptx::kernel::{LOCAL_WINDOW, SHARED_WINDOW, WINDOW_SIZE};
use crate::ptx::types::Space;

impl Block<'_> {
    /// Counts an instruction that the lanes `active` of `lanes` are about to execute.
    #[inline(never)]
    pub(super) fn count(
        &mut self,
        warp: &Warp,
        i: &Instruction,
        at: usize,
        lanes: u32,
        active: u32,
    ) {
        let kind = self.kernel.kinds[at];
        if let Some(counter) = &mut self.counter {
            counter.instruction(kind, active);
            match i.action {
                Action::Branch(_) => counter.branch(active, lanes),
                Action::Multiply { depth, factors } if active == u32::MAX => {
                    counter.multiplication(depth, factors);
                }
                _ => {}
            }
        }
        if active == 0 {
            return;
        }
        match i.action {
            Action::Load(access) => {
                let slot = i.slots[usize::from(access.count)];
                let addresses = warp.addresses(i, slot, access.wide_address);
                self.count_access(Way::Load, access, &addresses, active);
            }
            Action::Store(access) => {
                let addresses = warp.addresses(i, i.slots[0], access.wide_address);
                self.count_access(Way::Store, access, &addresses, active);
            }
            Action::Atomic(access, _) => {
                let addresses = warp.addresses(i, i.slots[1], access.wide_address);
                self.count_access(Way::Atomic, access, &addresses, active);
            }
            Action::AsyncCopy(size) => self.count_copy(warp, i, usize::from(size), active),
            // With fewer lanes it waits for the others, or is a fault.
            Action::LoadMatrix { count, .. } if active == u32::MAX => {
                let addresses = warp.addresses(i, i.slots[usize::from(count)], false);
                // Eight lanes have the addresses of the rows of one matrix.
                let rows = u32::MAX >> (LANES - 8 * usize::from(count));
                if let Some(counter) = &mut self.counter {
                    counter.shared(Way::Matrix, &addresses, rows, 16);
                }
            }
            _ => {}
        }
    }

    /// Takes back the count of an instruction that waits for other lanes, since it will be tried
    /// again.
    pub(super) fn take_back_count(&mut self, at: usize, active: u32) {
        let kind = self.kernel.kinds[at];
        if let Some(counter) = &mut self.counter {
            counter.take_back(kind, active);
        }
    }

    fn count_access(&mut self, way: Way, access: Access, addresses: &Addresses, active: u32) {
        let inside = |window: u64| {
            let is_inside = |&lane: &usize| addresses[lane].wrapping_sub(window) < WINDOW_SIZE;
            set(active).filter(is_inside).fold(0, |m, l| m | 1 << l)
        };
        let (global, shared) = match access.space {
            Space::Global => (active, 0),
            Space::Shared => (0, active),
            Space::Local | Space::Parameter => (0, 0),
            Space::Generic => {
                let (shared, local) = (inside(SHARED_WINDOW), inside(LOCAL_WINDOW));
                (active & !shared & !local, shared)
            }
        };
        let Some(counter) = &mut self.counter else {
            return;
        };
        if global != 0 {
            let bytes = u64::from(global.count_ones()) * access.bytes() as u64;
            counter.global(way, addresses, global, bytes);
        }
        if shared != 0 {
            // The window begins at a multiple of the width of all banks.
            counter.shared(way, addresses, shared, access.bytes());
        }
    }

    fn count_copy(&mut self, warp: &Warp, i: &Instruction, size: usize, active: u32) {
        let to = warp.addresses(i, i.slots[0], false);
        let (from, lengths) = (warp.file.wides(i.slots[1]), warp.file.words(i.slots[2]));
        let reading = |&lane: &usize| lengths[lane] > 0;
        let readers = set(active).filter(reading).fold(0, |m, l| m | 1 << l);
        let bytes = set(active).map(|lane| u64::from(lengths[lane])).sum();
        let Some(counter) = &mut self.counter else {
            return;
        };
        if readers != 0 {
            counter.global(Way::Copy, from, readers, bytes);
        }
        counter.shared(Way::Copy, &to, active, size);
    }
}
