//! Loads, stores and atomic operations, by state space.

use super::cells::{Cell, sized};
use super::warp::{Warp, set};
use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{ALL, Access, AtomicOperation, Instruction, LANES};
use crate::ptx::kernel::{LOCAL_WINDOW, SHARED_WINDOW, WINDOW_SIZE};
use crate::ptx::shared::of_lane;
use crate::ptx::types::Space;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::AcqRel, Ordering::Acquire};

/// Addresses of the lanes in the state space of the access.
pub(super) type Addresses = [u64; LANES];

impl Warp {
    /// Returns a lane of a register of either width.
    #[inline(always)]
    pub fn value(&self, slot: u16, lane: usize, wide: bool) -> u64 {
        if wide {
            self.file.wides(slot)[lane]
        } else {
            u64::from(self.file.words(slot)[lane])
        }
    }

    /// Writes the loaded value of each lane to a register, sign-extended if it is signed.
    #[inline(always)]
    pub(super) fn fill<T: Cell>(
        &mut self,
        slot: u16,
        lanes: u32,
        access: Access,
        read: impl Fn(usize) -> T,
    ) {
        let extended = |value: T| {
            if access.signed {
                value.signed()
            } else {
                value.wide()
            }
        };
        if access.wide {
            let row = self.file.wides_mut(slot);
            for lane in set(lanes) {
                row[lane] = extended(read(lane));
            }
            return;
        }
        let row = self.file.words_of_slot_mut(slot);
        if lanes == ALL {
            for (lane, to) in row.iter_mut().enumerate() {
                *to = extended(read(lane)) as u32;
            }
        } else {
            for lane in set(lanes) {
                row[lane] = extended(read(lane)) as u32;
            }
        }
    }

    /// Returns the addresses of an access, whose address register is `slot`.
    pub(super) fn addresses(&self, i: &Instruction, slot: u16, wide: bool) -> Addresses {
        let offset = i64::from(i.offset) as u64;
        let mut addresses = [0; LANES];
        if wide {
            for (to, from) in addresses.iter_mut().zip(self.file.wides(slot)) {
                *to = from.wrapping_add(offset);
            }
        } else {
            for (to, from) in addresses.iter_mut().zip(self.file.words(slot)) {
                *to = u64::from(from.wrapping_add(offset as u32));
            }
        }
        addresses
    }
}

impl Block<'_> {
    pub(super) fn load(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        at: usize,
        active: u32,
    ) -> Outcome<()> {
        let addresses = warp.addresses(i, i.slots[usize::from(access.count)], access.wide_address);
        let load = |block: &mut Self, space, addresses: &Addresses, lanes| {
            check_alignment(addresses, lanes, access.bytes())?;
            match space {
                Space::Shared => block.load_shared(warp, i, access, addresses, lanes, at),
                Space::Local => block.load_local(warp, i, access, addresses, lanes),
                Space::Parameter => block.load_parameter(warp, i, access, addresses, lanes),
                Space::Global | Space::Generic => {
                    block.load_global(warp, i, access, addresses, lanes)
                }
            }
        };
        self.by_space(access.space, &addresses, active, load)
    }

    pub(super) fn store(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        at: usize,
        active: u32,
    ) -> Outcome<()> {
        let addresses = warp.addresses(i, i.slots[0], access.wide_address);
        let store = |block: &mut Self, space, addresses: &Addresses, lanes| {
            check_alignment(addresses, lanes, access.bytes())?;
            match space {
                Space::Shared => block.store_shared(warp, i, access, addresses, lanes, at),
                Space::Local => block.store_local(warp, i, access, addresses, lanes),
                _ => block.store_global(warp, i, access, addresses, lanes),
            }
        };
        self.by_space(access.space, &addresses, active, store)
    }

    /// Calls `access` once per state space that the generic addresses refer to, with the lanes
    /// and addresses in that space.
    fn by_space(
        &mut self,
        space: Space,
        addresses: &Addresses,
        active: u32,
        mut access: impl FnMut(&mut Self, Space, &Addresses, u32) -> Outcome<()>,
    ) -> Outcome<()> {
        if space != Space::Generic {
            return access(self, space, addresses, active);
        }
        let mut rest = active;
        for (space, window) in [(Space::Shared, SHARED_WINDOW), (Space::Local, LOCAL_WINDOW)] {
            let is_inside = |&lane: &usize| addresses[lane].wrapping_sub(window) < WINDOW_SIZE;
            let lanes = set(rest).filter(is_inside).fold(0, |m, l| m | 1 << l);
            if lanes != 0 {
                rest &= !lanes;
                access(
                    self,
                    space,
                    &addresses.map(|a| a.wrapping_sub(window)),
                    lanes,
                )?;
            }
        }
        if rest != 0 {
            access(self, Space::Global, addresses, rest)
        } else {
            Ok(())
        }
    }

    fn load_shared(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
        at: usize,
    ) -> Outcome<()> {
        let bytes = access.bytes();
        let stamp = self.shared.stamp(warp.visitor(0, at, access.ordered));
        for lane in set(lanes) {
            self.check_shared(addresses[lane], bytes, lane)?;
            let noted = self
                .shared
                .read_as(addresses[lane] as usize, bytes, of_lane(stamp, lane));
            noted.map_err(|c| self.shared_fault(c, lane, "reads"))?;
        }
        let data = &self.shared.data;
        sized!(access.size, T => {
            for element in 0..usize::from(access.count) {
                let offset = element * size_of::<T>();
                let read = |lane: usize| T::from_bytes(&data[addresses[lane] as usize + offset..][..size_of::<T>()]);
                warp.fill(i.slots[element], lanes, access, read);
            }
        });
        Ok(())
    }

    fn store_shared(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
        at: usize,
    ) -> Outcome<()> {
        let (size, bytes) = (usize::from(access.size), access.bytes());
        let stamp = self.shared.stamp(warp.visitor(0, at, access.ordered));
        for lane in set(lanes) {
            self.check_shared(addresses[lane], bytes, lane)?;
            let address = addresses[lane] as usize;
            let mut new = [0u8; 16];
            for element in 0..usize::from(access.count) {
                let value = warp
                    .value(i.slots[1 + element], lane, access.wide)
                    .to_le_bytes();
                new[element * size..][..size].copy_from_slice(&value[..size]);
            }
            let old = &mut self.shared.data[address..address + bytes];
            let same = *old == new[..bytes];
            old.copy_from_slice(&new[..bytes]);
            let noted = self
                .shared
                .write_as(address, bytes, of_lane(stamp, lane), same);
            noted.map_err(|c| self.shared_fault(c, lane, "writes"))?;
        }
        Ok(())
    }

    /// Returns the index of a lane's bytes in local memory.
    fn local(&self, warp: &Warp, address: u64, bytes: usize, lane: usize) -> Outcome<usize> {
        let size = self.kernel.local;
        if address <= size as u64 && bytes as u64 <= size as u64 - address {
            return Ok(lane * (warp.local.len() / LANES) + address as usize);
        }
        let detail = format!("{bytes} bytes of local memory, of which a thread has {size}");
        Err(Stop::new(FaultKind::OutOfBounds, detail)
            .at(address, "local memory")
            .at_lane(lane))
    }

    fn load_local(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
    ) -> Outcome<()> {
        for lane in set(lanes) {
            let place = self.local(warp, addresses[lane], access.bytes(), lane)?;
            sized!(access.size, T => {
                for element in 0..usize::from(access.count) {
                    let value = T::from_bytes(&warp.local[place + element * size_of::<T>()..][..size_of::<T>()]);
                    warp.fill(i.slots[element], 1 << lane, access, |_| value);
                }
            });
        }
        Ok(())
    }

    fn store_local(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
    ) -> Outcome<()> {
        for lane in set(lanes) {
            let place = self.local(warp, addresses[lane], access.bytes(), lane)?;
            sized!(access.size, T => {
                for element in 0..usize::from(access.count) {
                    let value = T::narrow(warp.value(i.slots[1 + element], lane, access.wide));
                    value.to_bytes(&mut warp.local[place + element * size_of::<T>()..][..size_of::<T>()]);
                }
            });
        }
        Ok(())
    }

    fn load_parameter(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
    ) -> Outcome<()> {
        let (parameters, end) = (&self.launch.parameters, self.launch.parameters.len() as u64);
        let outside =
            |&lane: &usize| addresses[lane] > end || access.bytes() as u64 > end - addresses[lane];
        if let Some(lane) = set(lanes).find(outside) {
            let detail = format!("reads beyond the {end} bytes of parameters");
            return Err(Stop::new(FaultKind::OutOfBounds, detail)
                .at(addresses[lane], "parameters")
                .at_lane(lane));
        }
        sized!(access.size, T => {
            for element in 0..usize::from(access.count) {
                let offset = element * size_of::<T>();
                let read = |lane: usize| T::from_bytes(&parameters[addresses[lane] as usize + offset..][..size_of::<T>()]);
                warp.fill(i.slots[element], lanes, access, read);
            }
        });
        Ok(())
    }

    pub(super) fn atomic(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        operation: AtomicOperation,
        at: usize,
        active: u32,
    ) -> Outcome<()> {
        let addresses = warp.addresses(i, i.slots[1], access.wide_address);
        let size = usize::from(access.size);
        self.by_space(
            access.space,
            &addresses,
            active,
            |block, space, addresses, lanes| {
                check_alignment(addresses, lanes, size)?;
                for lane in set(lanes) {
                    let (b, c) = (
                        warp.value(i.slots[2], lane, access.wide),
                        warp.value(i.slots[3], lane, access.wide),
                    );
                    let change = |old: u64| apply(operation, size, old, b, c);
                    let old = match space {
                        Space::Shared => {
                            block.change_shared(warp, at, addresses[lane], size, lane, change)?
                        }
                        Space::Local | Space::Parameter => {
                            return Err(Stop::new(
                                FaultKind::Unsupported,
                                "an atomic operation on local memory",
                            )
                            .at_lane(lane));
                        }
                        _ => {
                            block.require_waited(warp, 1 << lane, "writes")?;
                            let spot =
                                block.locate(warp, addresses[lane], size, lane, "changes")?;
                            block.note_writer(warp, addresses[lane], size);
                            block.check_defined(addresses[lane], spot, size, lane)?;
                            // SAFETY: `locate` found the bytes; they are as aligned as the
                            // address.
                            unsafe { exchange(spot.data, size, change) }
                        }
                    };
                    warp.fill(i.slots[0], 1 << lane, access, |_| old);
                }
                Ok(())
            },
        )
    }

    fn change_shared(
        &mut self,
        warp: &Warp,
        at: usize,
        address: u64,
        size: usize,
        lane: usize,
        change: impl Fn(u64) -> u64,
    ) -> Outcome<u64> {
        self.check_shared(address, size, lane)?;
        let (place, who) = (address as usize, warp.visitor(lane, at, true));
        self.shared
            .read(place, size, who)
            .map_err(|c| self.shared_fault(c, lane, "reads"))?;
        self.shared
            .write(place, size, who, false)
            .map_err(|c| self.shared_fault(c, lane, "writes"))?;
        let bytes = &mut self.shared.data[place..place + size];
        let old = if size == 4 {
            u32::from_bytes(bytes).wide()
        } else {
            u64::from_bytes(bytes)
        };
        bytes.copy_from_slice(&change(old).to_le_bytes()[..size]);
        Ok(old)
    }
}

fn check_alignment(addresses: &Addresses, lanes: u32, bytes: usize) -> Outcome<()> {
    let low = bytes as u64 - 1;
    if lanes == ALL && addresses.iter().fold(0, |all, a| all | a) & low == 0 {
        return Ok(());
    }
    let Some(lane) = set(lanes).find(|&lane| addresses[lane] & low != 0) else {
        return Ok(());
    };
    let detail =
        format!("an access of {bytes} bytes needs an address that is a multiple of its size");
    Err(Stop::new(FaultKind::Misaligned, detail)
        .at(addresses[lane], "misaligned")
        .at_lane(lane))
}

/// Replaces a value and returns the old one.
///
/// # Safety
/// The bytes must exist and be aligned to their size, which is 4 or 8.
unsafe fn exchange(data: *mut u8, size: usize, change: impl Fn(u64) -> u64) -> u64 {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if size == 4 {
            let cell = AtomicU32::from_ptr(data.cast());
            let change = |old| Some(change(u64::from(old)) as u32);
            let (Ok(old) | Err(old)) = cell.fetch_update(AcqRel, Acquire, change);
            u64::from(old)
        } else {
            let cell = AtomicU64::from_ptr(data.cast());
            let (Ok(old) | Err(old)) = cell.fetch_update(AcqRel, Acquire, |old| Some(change(old)));
            old
        }
    }
}

/// Returns the value after an atomic operation.
fn apply(operation: AtomicOperation, size: usize, old: u64, b: u64, c: u64) -> u64 {
    let signed = |x: u64| {
        if size == 4 {
            i64::from(x as i32)
        } else {
            x as i64
        }
    };
    let single = |x: u64| f32::from_bits(x as u32);
    match operation {
        AtomicOperation::Add => old.wrapping_add(b),
        AtomicOperation::AddSingle => {
            u64::from(super::float::canonical(single(old) + single(b)).to_bits())
        }
        AtomicOperation::AddDouble => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        AtomicOperation::Min => old.min(b),
        AtomicOperation::Max => old.max(b),
        AtomicOperation::MinSigned => signed(old).min(signed(b)) as u64,
        AtomicOperation::MaxSigned => signed(old).max(signed(b)) as u64,
        AtomicOperation::And => old & b,
        AtomicOperation::Or => old | b,
        AtomicOperation::Xor => old ^ b,
        AtomicOperation::Increment => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        AtomicOperation::Decrement => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        AtomicOperation::Exchange => b,
        AtomicOperation::CompareAndSwap => {
            if old == b {
                c
            } else {
                old
            }
        }
    }
}
