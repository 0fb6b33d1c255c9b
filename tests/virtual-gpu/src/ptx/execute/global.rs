//! Global memory: locating bytes, and reading and writing them for many lanes at once.

use super::cells::{Cell, all_marked, set_marks, sized};
use super::memory::Addresses;
use super::warp::{Warp, set};
use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{Access, Instruction};
use crate::ptx::memory::Region;
use std::sync::atomic::AtomicU8;

/// Host location of bytes of device memory.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    pub data: *mut u8,
    /// Null if writes are not tracked.
    marks: *const AtomicU8,
}

impl Spot {
    fn new(region: &Region, address: u64) -> Self {
        let offset = address.wrapping_sub(region.base) as usize;
        let marks = region.defined;
        Spot {
            data: region.data.wrapping_add(offset),
            marks: if marks.is_null() {
                marks
            } else {
                marks.wrapping_add(offset)
            },
        }
    }

    #[inline(always)]
    pub(super) fn add(self, offset: u64) -> Self {
        let marks = if self.marks.is_null() {
            self.marks
        } else {
            self.marks.wrapping_add(offset as usize)
        };
        Spot {
            data: self.data.wrapping_add(offset as usize),
            marks,
        }
    }

    /// Marks bytes as written.
    ///
    /// # Safety
    /// The bytes must exist.
    #[inline(always)]
    unsafe fn mark(self, bytes: usize) {
        if !self.marks.is_null() {
            // SAFETY: the bytes exist as the caller guarantees, and a region has as many marks
            // as bytes.
            unsafe { set_marks(self.marks, bytes) }
        }
    }
}

impl Block<'_> {
    /// Returns the location of the bytes at a global address.
    #[inline]
    pub(super) fn locate(
        &self,
        warp: &mut Warp,
        address: u64,
        bytes: usize,
        lane: usize,
        verb: &str,
    ) -> Outcome<Spot> {
        match self.find(warp, address, bytes as u64) {
            Some(region) => Ok(Spot::new(region, address)),
            None => {
                let detail = format!("{verb} {bytes} bytes outside of every allocation");
                let stop = Stop::new(FaultKind::OutOfBounds, detail);
                Err(stop
                    .at(address, self.memory.describe(address))
                    .at_lane(lane))
            }
        }
    }

    /// Returns the region that contains all these bytes. The region found last is tried first.
    #[inline(always)]
    fn find(&self, warp: &mut Warp, address: u64, bytes: u64) -> Option<&Region> {
        let hinted = self
            .memory
            .get(warp.hint)
            .filter(|r| r.holds(address, bytes));
        hinted.or_else(|| {
            warp.hint = self.memory.find(address, bytes)?;
            self.memory.get(warp.hint)
        })
    }

    /// Returns the location of the lowest address and that address, if one allocation contains
    /// the bytes of all lanes.
    fn span(
        &self,
        warp: &mut Warp,
        addresses: &Addresses,
        lanes: u32,
        bytes: usize,
    ) -> Option<(Spot, u64)> {
        let (mut low, mut high) = (u64::MAX, 0);
        for (lane, &address) in addresses.iter().enumerate() {
            if lanes >> lane & 1 == 1 {
                low = low.min(address);
                high = high.max(address);
            }
        }
        let region = self.find(warp, low, (high - low).checked_add(bytes as u64)?)?;
        Some((Spot::new(region, low), low))
    }

    /// Fails unless all bytes have been written.
    #[inline(always)]
    pub(super) fn check_defined(
        &self,
        address: u64,
        spot: Spot,
        bytes: usize,
        lane: usize,
    ) -> Outcome<()> {
        // SAFETY: `locate` found these bytes, so their marks exist.
        if spot.marks.is_null()
            || !self.check_initialised
            || unsafe { all_marked(spot.marks, bytes) }
        {
            return Ok(());
        }
        Err(self.undefined(address, spot, bytes, lane))
    }

    #[cold]
    fn undefined(&self, address: u64, spot: Spot, bytes: usize, lane: usize) -> Box<Stop> {
        // SAFETY: `locate` found these bytes, so their marks exist.
        let is_unset = |at: &u64| unsafe { !all_marked(spot.add(*at).marks, 1) };
        let address = address + (0..bytes as u64).find(is_unset).unwrap_or(0);
        let stop = Stop::new(
            FaultKind::UninitialisedRead,
            "reads memory that was never written",
        );
        stop.at(address, self.memory.describe(address))
            .at_lane(lane)
    }

    pub(super) fn load_global(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
    ) -> Outcome<()> {
        let bytes = access.bytes();
        let Some((spot, low)) = self.span(warp, addresses, lanes, bytes) else {
            // The bytes are in several allocations, or outside of all: go lane by lane.
            for lane in set(lanes) {
                let spot = self.locate(warp, addresses[lane], bytes, lane, "reads")?;
                self.check_reader(warp, addresses[lane], bytes, lane)?;
                self.check_defined(addresses[lane], spot, bytes, lane)?;
                self.load_spots(
                    warp,
                    i,
                    access,
                    addresses,
                    1 << lane,
                    (spot, addresses[lane]),
                );
            }
            return Ok(());
        };
        if self.is_early(warp, lanes) {
            for lane in set(lanes) {
                self.check_reader(warp, addresses[lane], bytes, lane)?;
            }
        }
        if self.check_initialised && !spot.marks.is_null() {
            for lane in set(lanes) {
                self.check_defined(
                    addresses[lane],
                    spot.add(addresses[lane] - low),
                    bytes,
                    lane,
                )?;
            }
        }
        self.load_spots(warp, i, access, addresses, lanes, (spot, low));
        Ok(())
    }

    /// Loads from bytes that exist.
    fn load_spots(
        &self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
        base: (Spot, u64),
    ) {
        let (spot, low) = base;
        sized!(access.size, T => {
            for element in 0..usize::from(access.count) {
                let offset = (element * size_of::<T>()) as u64;
                let read = |lane: usize| {
                    // SAFETY: the caller located the bytes; they are as aligned as the address.
                    unsafe { T::read(spot.add(addresses[lane] - low + offset).data) }
                };
                warp.fill(i.slots[element], lanes, access, read);
            }
        });
    }

    pub(super) fn store_global(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        access: Access,
        addresses: &Addresses,
        lanes: u32,
    ) -> Outcome<()> {
        let bytes = access.bytes();
        self.require_waited(warp, lanes, "writes")?;
        match self.span(warp, addresses, lanes, bytes) {
            Some(base) => {
                for lane in set(lanes) {
                    self.note_writer(warp, addresses[lane], bytes);
                }
                store_spots(warp, i, access, addresses, lanes, base);
            }
            None => {
                for lane in set(lanes) {
                    let spot = self.locate(warp, addresses[lane], bytes, lane, "writes")?;
                    self.note_writer(warp, addresses[lane], bytes);
                    store_spots(
                        warp,
                        i,
                        access,
                        addresses,
                        1 << lane,
                        (spot, addresses[lane]),
                    );
                }
            }
        }
        Ok(())
    }
}

/// Stores to bytes that exist.
fn store_spots(
    warp: &Warp,
    i: &Instruction,
    access: Access,
    addresses: &Addresses,
    lanes: u32,
    base: (Spot, u64),
) {
    let (spot, low) = base;
    sized!(access.size, T => {
        for element in 0..usize::from(access.count) {
            let offset = (element * size_of::<T>()) as u64;
            let slot = i.slots[1 + element];
            for lane in set(lanes) {
                let value = T::narrow(warp.value(slot, lane, access.wide));
                // SAFETY: the caller located the bytes; they are as aligned as the address.
                unsafe { value.write(spot.add(addresses[lane] - low + offset).data) }
            }
        }
    });
    if !spot.marks.is_null() {
        for lane in set(lanes) {
            // SAFETY: the caller located the bytes.
            unsafe { spot.add(addresses[lane] - low).mark(access.bytes()) }
        }
    }
}
