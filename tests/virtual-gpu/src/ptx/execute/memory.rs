//! Loads, stores, atomic operations and asynchronous copies.

use super::warp::{Pending, Warp, set};
use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{Access, AtomicOperation, Instruction, LANES};
use crate::ptx::kernel::{LOCAL_WINDOW, SHARED_WINDOW, WINDOW_SIZE};
use crate::ptx::types::Space;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// Addresses of the lanes in the space of the access.
type Addresses = [u64; LANES];

impl Block<'_> {
    pub(super) fn load(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        at: usize,
        active: u32,
    ) -> Outcome<()> {
        let addresses = addresses(
            warp,
            i,
            i.slots[usize::from(access.count)],
            access.wide_address,
        );
        for (space, lanes, addresses) in spaces(access.space, addresses, active)
            .into_iter()
            .flatten()
        {
            check_alignment(&addresses, lanes, access.bytes())?;
            match space {
                Space::Global | Space::Generic => {
                    self.load_global(warp, i, access, &addresses, lanes)?
                }
                Space::Shared => self.load_shared(warp, i, access, &addresses, lanes, at)?,
                Space::Local => self.load_local(warp, i, access, &addresses, lanes)?,
                Space::Parameter => self.load_parameter(warp, i, access, &addresses, lanes)?,
            }
        }
        Ok(())
    }

    pub(super) fn store(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        at: usize,
        active: u32,
    ) -> Outcome<()> {
        let addresses = addresses(warp, i, i.slots[0], access.wide_address);
        for (space, lanes, addresses) in spaces(access.space, addresses, active)
            .into_iter()
            .flatten()
        {
            check_alignment(&addresses, lanes, access.bytes())?;
            match space {
                Space::Shared => self.store_shared(warp, i, access, &addresses, lanes, at)?,
                Space::Local => self.store_local(warp, i, access, &addresses, lanes)?,
                _ => self.store_global(warp, i, access, &addresses, lanes)?,
            }
        }
        Ok(())
    }

    /// The bytes at a global address, and their marks.
    fn locate(
        &self,
        warp: &mut Warp,
        address: u64,
        bytes: usize,
        lane: usize,
        verb: &str,
    ) -> Outcome<(*mut u8, *const AtomicU8)> {
        let hinted = self
            .memory
            .get(warp.hint)
            .filter(|r| r.holds(address, bytes as u64));
        let found = hinted.or_else(|| {
            warp.hint = self.memory.find(address, bytes as u64)?;
            self.memory.get(warp.hint)
        });
        let Some(region) = found else {
            let detail = format!("{verb} {bytes} bytes outside of every allocation");
            let stop = Stop::new(FaultKind::OutOfBounds, detail);
            return Err(stop
                .at(address, self.memory.describe(address))
                .at_lane(lane));
        };
        let offset = (address - region.base) as usize;
        let marks = if region.defined.is_null() {
            std::ptr::null()
        } else {
            region.defined.wrapping_add(offset)
        };
        Ok((region.data.wrapping_add(offset), marks))
    }

    /// Whether all bytes have been written.
    fn check_defined(
        &self,
        address: u64,
        marks: *const AtomicU8,
        bytes: usize,
        lane: usize,
    ) -> Outcome<()> {
        if marks.is_null() || !self.check_initialised {
            return Ok(());
        }
        for byte in 0..bytes {
            // SAFETY: `locate` found these bytes and their marks in a region.
            if unsafe { (*marks.add(byte)).load(Relaxed) } == 0 {
                let address = address + byte as u64;
                let stop = Stop::new(
                    FaultKind::UninitialisedRead,
                    "reads memory that nobody wrote",
                );
                return Err(stop
                    .at(address, self.memory.describe(address))
                    .at_lane(lane));
            }
        }
        Ok(())
    }

    fn load_global(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
    ) -> Outcome<()> {
        let (size, bytes) = (usize::from(access.size), access.bytes());
        for lane in set(lanes) {
            let (data, marks) = self.locate(warp, addresses[lane], bytes, lane, "reads")?;
            self.check_defined(addresses[lane], marks, bytes, lane)?;
            for element in 0..usize::from(access.count) {
                // SAFETY: `locate` found the bytes; they are aligned as the address is.
                let value = unsafe { read_atomic(data.add(element * size), size) };
                put(warp, i.slots[element], lane, value, access);
            }
        }
        Ok(())
    }

    fn store_global(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
    ) -> Outcome<()> {
        let (size, bytes) = (usize::from(access.size), access.bytes());
        for lane in set(lanes) {
            let (data, marks) = self.locate(warp, addresses[lane], bytes, lane, "writes")?;
            for element in 0..usize::from(access.count) {
                let value = get(warp, i.slots[1 + element], lane, access.wide);
                // SAFETY: `locate` found the bytes; they are aligned as the address is.
                unsafe { write_atomic(data.add(element * size), size, value) };
            }
            mark(marks, bytes);
        }
        Ok(())
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
        let (size, bytes) = (usize::from(access.size), access.bytes());
        for lane in set(lanes) {
            self.check_shared(addresses[lane], bytes, lane)?;
            let address = addresses[lane] as usize;
            let who = warp.visitor(lane, at, access.ordered);
            self.shared
                .read(address, bytes, who)
                .map_err(|c| self.shared_fault(c, lane, "reads"))?;
            for element in 0..usize::from(access.count) {
                let value = little_endian(&self.shared.data[address + element * size..][..size]);
                put(warp, i.slots[element], lane, value, access);
            }
        }
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
        for lane in set(lanes) {
            self.check_shared(addresses[lane], bytes, lane)?;
            let address = addresses[lane] as usize;
            let mut new = [0u8; 16];
            for element in 0..usize::from(access.count) {
                let value = get(warp, i.slots[1 + element], lane, access.wide).to_le_bytes();
                new[element * size..][..size].copy_from_slice(&value[..size]);
            }
            let old = &mut self.shared.data[address..address + bytes];
            let same = *old == new[..bytes];
            old.copy_from_slice(&new[..bytes]);
            let who = warp.visitor(lane, at, access.ordered);
            self.shared
                .write(address, bytes, who, same)
                .map_err(|c| self.shared_fault(c, lane, "writes"))?;
        }
        Ok(())
    }

    /// Where a lane's local bytes are.
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
        let size = usize::from(access.size);
        for lane in set(lanes) {
            let place = self.local(warp, addresses[lane], access.bytes(), lane)?;
            for element in 0..usize::from(access.count) {
                let value = little_endian(&warp.local[place + element * size..][..size]);
                put(warp, i.slots[element], lane, value, access);
            }
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
        let size = usize::from(access.size);
        for lane in set(lanes) {
            let place = self.local(warp, addresses[lane], access.bytes(), lane)?;
            for element in 0..usize::from(access.count) {
                let value = get(warp, i.slots[1 + element], lane, access.wide).to_le_bytes();
                warp.local[place + element * size..][..size].copy_from_slice(&value[..size]);
            }
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
        let size = usize::from(access.size);
        let parameters = &self.launch.parameters;
        for lane in set(lanes) {
            let (address, end) = (addresses[lane], parameters.len() as u64);
            if address > end || access.bytes() as u64 > end - address {
                let detail = format!("reads beyond the {end} bytes of parameters");
                return Err(Stop::new(FaultKind::OutOfBounds, detail)
                    .at(address, "parameters")
                    .at_lane(lane));
            }
            for element in 0..usize::from(access.count) {
                let value = little_endian(&parameters[address as usize + element * size..][..size]);
                put(warp, i.slots[element], lane, value, access);
            }
        }
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
        let addresses = addresses(warp, i, i.slots[1], access.wide_address);
        let size = usize::from(access.size);
        for (space, lanes, addresses) in spaces(access.space, addresses, active)
            .into_iter()
            .flatten()
        {
            check_alignment(&addresses, lanes, size)?;
            for lane in set(lanes) {
                let b = get(warp, i.slots[2], lane, access.wide);
                let c = get(warp, i.slots[3], lane, access.wide);
                let change = |old: u64| apply(operation, size, old, b, c);
                let old = match space {
                    Space::Shared => {
                        self.check_shared(addresses[lane], size, lane)?;
                        let address = addresses[lane] as usize;
                        let who = warp.visitor(lane, at, true);
                        self.shared
                            .read(address, size, who)
                            .map_err(|c| self.shared_fault(c, lane, "reads"))?;
                        self.shared
                            .write(address, size, who, false)
                            .map_err(|c| self.shared_fault(c, lane, "writes"))?;
                        let bytes = &mut self.shared.data[address..address + size];
                        let old = little_endian(bytes);
                        bytes.copy_from_slice(&change(old).to_le_bytes()[..size]);
                        old
                    }
                    Space::Local | Space::Parameter => {
                        return Err(Stop::new(
                            FaultKind::Unsupported,
                            "an atomic operation on local memory",
                        )
                        .at_lane(lane));
                    }
                    _ => {
                        let (data, marks) =
                            self.locate(warp, addresses[lane], size, lane, "changes")?;
                        self.check_defined(addresses[lane], marks, size, lane)?;
                        // SAFETY: `locate` found the bytes; they are aligned as the address is.
                        unsafe { exchange(data, size, change) }
                    }
                };
                put(warp, i.slots[0], lane, old, access);
            }
        }
        Ok(())
    }

    /// `cp.async`: the bytes stay where they are until the thread waits for them.
    pub(super) fn copy(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        size: u8,
        at: usize,
        active: u32,
    ) -> Outcome<()> {
        let to = *warp.file.words(i.slots[0]);
        let from = *warp.file.wides(i.slots[1]);
        let lengths = *warp.file.words(i.slots[2]);
        let bytes = usize::from(size);
        for lane in set(active) {
            let address = u64::from(to[lane].wrapping_add(i.offset as u32));
            let wanted = lengths[lane] as usize;
            if wanted > bytes {
                let detail = format!("{wanted} bytes to read for a copy of {bytes}");
                return Err(Stop::new(FaultKind::OutOfBounds, detail).at_lane(lane));
            }
            let misaligned = if address % u64::from(size) != 0 {
                Some(address)
            } else {
                None
            };
            let misaligned = misaligned
                .or((wanted > 0 && from[lane] % u64::from(size) != 0).then_some(from[lane]));
            if let Some(wrong) = misaligned {
                let detail =
                    format!("a copy of {bytes} bytes needs addresses that are multiples of that");
                return Err(Stop::new(FaultKind::Misaligned, detail)
                    .at(wrong, "source or target")
                    .at_lane(lane));
            }
            self.check_shared(address, bytes, lane)?;
            let mut source = std::ptr::null();
            if wanted > 0 {
                let (data, marks) = self.locate(warp, from[lane], wanted, lane, "copies")?;
                self.check_defined(from[lane], marks, wanted, lane)?;
                source = data.cast_const();
            }
            let who = warp.visitor(lane, at, false);
            let begun = self.shared.begin_copy(address as usize, bytes, who);
            begun.map_err(|c| self.shared_fault(c, lane, "copies to"))?;
            let (lane, group) = (lane as u32, warp.committed[lane]);
            warp.pending.push(Pending {
                lane,
                group,
                to: address as usize,
                size,
                bytes: wanted as u8,
                from: source,
                at: at as u32,
            });
        }
        Ok(())
    }

    /// Lets the copies arrive that the lanes wait for.
    pub(super) fn wait(
        &mut self,
        warp: &mut Warp,
        pending: Option<u32>,
        _at: usize,
        active: u32,
    ) -> Outcome<()> {
        let mut copies = std::mem::take(&mut warp.pending);
        copies.retain(|copy| {
            let committed = warp.committed[copy.lane as usize];
            let arrives = match pending {
                None => true,
                // The last `groups` committed groups may still be on their way, and what is not committed.
                Some(groups) => copy.group.saturating_add(groups) < committed,
            };
            if active >> copy.lane & 1 == 0 || !arrives {
                return true;
            }
            let (size, bytes) = (usize::from(copy.size), usize::from(copy.bytes));
            let mut data = [0; 16];
            for (byte, value) in data.iter_mut().enumerate().take(bytes) {
                // SAFETY: `copy` found these bytes in a region, which stays while the kernel runs.
                *value =
                    unsafe { AtomicU8::from_ptr(copy.from.add(byte).cast_mut()).load(Relaxed) };
            }
            self.shared.data[copy.to..copy.to + size].copy_from_slice(&data[..size]);
            let who = warp.visitor(copy.lane as usize, copy.at as usize, false);
            self.shared.end_copy(copy.to, size, who);
            false
        });
        warp.pending = copies;
        Ok(())
    }
}

fn addresses(warp: &Warp, i: &Instruction, slot: u16, wide: bool) -> Addresses {
    let offset = i64::from(i.offset) as u64;
    if wide {
        warp.file.wides(slot).map(|a| a.wrapping_add(offset))
    } else {
        warp.file
            .words(slot)
            .map(|a| u64::from(a.wrapping_add(offset as u32)))
    }
}

/// Generic addresses by the space that they mean, with addresses in it.
fn spaces(space: Space, addresses: Addresses, active: u32) -> [Option<(Space, u32, Addresses)>; 3] {
    if space != Space::Generic {
        return [Some((space, active, addresses)), None, None];
    }
    let inside = |window: u64| {
        set(active)
            .filter(|&l| addresses[l].wrapping_sub(window) < WINDOW_SIZE)
            .fold(0, |m, l| m | 1 << l)
    };
    let (shared, local): (u32, u32) = (inside(SHARED_WINDOW), inside(LOCAL_WINDOW));
    let part = |space, lanes, window| {
        (lanes != 0).then(|| (space, lanes, addresses.map(|a: u64| a.wrapping_sub(window))))
    };
    [
        part(Space::Global, active & !shared & !local, 0),
        part(Space::Shared, shared, SHARED_WINDOW),
        part(Space::Local, local, LOCAL_WINDOW),
    ]
}

fn check_alignment(addresses: &Addresses, lanes: u32, bytes: usize) -> Outcome<()> {
    let wrong = set(lanes).find(|&lane| addresses[lane] & (bytes as u64 - 1) != 0);
    let Some(lane) = wrong else { return Ok(()) };
    let stop = Stop::new(
        FaultKind::Misaligned,
        format!("an access of {bytes} bytes needs an address that is a multiple of that"),
    );
    Err(stop.at(addresses[lane], "misaligned").at_lane(lane))
}

fn get(warp: &Warp, slot: u16, lane: usize, wide: bool) -> u64 {
    if wide {
        warp.file.wides(slot)[lane]
    } else {
        u64::from(warp.file.words(slot)[lane])
    }
}

/// Writes a loaded value to a lane, with its sign in what is above.
fn put(warp: &mut Warp, slot: u16, lane: usize, value: u64, access: Access) {
    let value = match (access.signed, access.size) {
        (true, 1) => value as i8 as i64 as u64,
        (true, 2) => value as i16 as i64 as u64,
        (true, 4) => value as i32 as i64 as u64,
        _ => value,
    };
    if access.wide {
        warp.file.wides_mut(slot)[lane] = value;
    } else {
        warp.file.words_of_slot_mut(slot)[lane] = value as u32;
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(value)
}

/// Marks bytes as written.
fn mark(marks: *const AtomicU8, bytes: usize) {
    if marks.is_null() {
        return;
    }
    for byte in 0..bytes {
        // SAFETY: `locate` found these marks in a region.
        unsafe { (*marks.add(byte)).store(1, Relaxed) };
    }
}

/// # Safety
/// The bytes exist and are aligned to their size.
unsafe fn read_atomic(data: *mut u8, size: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => u64::from(AtomicU8::from_ptr(data).load(Relaxed)),
            2 => u64::from(AtomicU16::from_ptr(data.cast()).load(Relaxed)),
            4 => u64::from(AtomicU32::from_ptr(data.cast()).load(Relaxed)),
            _ => AtomicU64::from_ptr(data.cast()).load(Relaxed),
        }
    }
}

/// # Safety
/// The bytes exist and are aligned to their size.
unsafe fn write_atomic(data: *mut u8, size: usize, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(data).store(value as u8, Relaxed),
            2 => AtomicU16::from_ptr(data.cast()).store(value as u16, Relaxed),
            4 => AtomicU32::from_ptr(data.cast()).store(value as u32, Relaxed),
            _ => AtomicU64::from_ptr(data.cast()).store(value, Relaxed),
        }
    }
}

/// Replaces a value and gives the old one.
///
/// # Safety
/// The bytes exist and are aligned to their size, 4 or 8.
unsafe fn exchange(data: *mut u8, size: usize, change: impl Fn(u64) -> u64) -> u64 {
    // SAFETY: the caller's.
    unsafe {
        if size == 4 {
            let cell = AtomicU32::from_ptr(data.cast());
            u64::from(cell.update(Relaxed, Relaxed, |old| change(u64::from(old)) as u32))
        } else {
            AtomicU64::from_ptr(data.cast()).update(Relaxed, Relaxed, change)
        }
    }
}

/// The value after an atomic operation.
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
