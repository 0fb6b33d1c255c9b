//! Barriers across a block.

use super::warp::{Wait, Warp, set};
use super::{Block, Flow, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{Action, Barrier, Instruction, Vote};

impl Block<'_> {
    /// Makes lanes of a warp arrive at a barrier.
    pub(super) fn arrive(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        barrier: Barrier,
        lanes: u32,
        active: u32,
    ) -> Outcome<Flow> {
        let first = active.trailing_zeros() as usize;
        if barrier.aligned {
            let together = warp
                .gathered(lanes, active, warp.exists)
                .map_err(|mut stop| {
                    stop.kind = FaultKind::DivergentBarrier;
                    stop
                })?;
            if !together {
                return Ok(Flow::Lanes);
            }
        }
        let (id, count) = (
            warp.file.words(i.slots[1])[first],
            warp.file.words(i.slots[2])[first],
        );
        let wrong = if id >= 16 {
            Some(format!("barrier {id} does not exist"))
        } else if barrier.with_count
            && (count == 0 || count % 32 != 0 || count > self.threads.next_multiple_of(32))
        {
            Some(format!(
                "{count} threads cannot meet at a barrier in a block of {}",
                self.threads
            ))
        } else {
            None
        };
        if let Some(detail) = wrong {
            return Err(Stop::new(FaultKind::DivergentBarrier, detail).at_lane(first));
        }
        let count = if barrier.with_count { count } else { 0 };
        if barrier.arrive {
            self.arrivals[id as usize] += active.count_ones();
            return Ok(Flow::Next);
        }
        Ok(Flow::Barrier { id, count })
    }

    /// Resumes the groups whose barrier is complete. Called when every warp waits or has
    /// exited. A barrier that can never complete is a fault.
    pub fn release(&mut self, warps: &mut [Warp]) -> Result<(), (u32, usize, Box<Stop>)> {
        let mut released = false;
        for id in 0..16 {
            released |= self.release_one(warps, id)?;
        }
        if released {
            return Ok(());
        }
        for warp in warps.iter() {
            if let Some(group) = warp.groups.first() {
                let detail = format!("the barrier never completes: {}", self.whereabouts(warps));
                let stop = Stop::new(FaultKind::DivergentBarrier, detail)
                    .at_lane(group.lanes.trailing_zeros() as usize);
                return Err((warp.id, group.at as usize, stop));
            }
        }
        Ok(())
    }

    fn release_one(
        &mut self,
        warps: &mut [Warp],
        id: u32,
    ) -> Result<bool, (u32, usize, Box<Stop>)> {
        // Warp, instruction and lanes of each group that waits here, with the thread count that
        // it waits for.
        let mut waiting = Vec::new();
        for warp in warps.iter() {
            for group in &warp.groups {
                if let Wait::Barrier { id: at, count } = group.wait
                    && at == id
                {
                    waiting.push((warp.id, group.at as usize, group.lanes, count));
                }
            }
        }
        let Some(&(warp, at, lanes, count)) = waiting.first() else {
            return Ok(false);
        };
        let arrived =
            waiting.iter().map(|w| w.2.count_ones()).sum::<u32>() + self.arrivals[id as usize];
        let expected = if count == 0 { self.threads } else { count };
        let fault = |detail: String| {
            let stop = Stop::new(FaultKind::DivergentBarrier, detail)
                .at_lane(lanes.trailing_zeros() as usize);
            Err((warp, at, stop))
        };
        if let Some(other) = waiting
            .iter()
            .find(|w| w.3 != count || count == 0 && w.1 != at)
        {
            let (mine, line) = (
                self.kernel.places[at].line,
                self.kernel.places[other.1].line,
            );
            return fault(format!(
                "threads wait at barrier {id} in lines {mine} and {line}: not all reach the same one"
            ));
        }
        let expected_lanes = if count == 0 {
            expected
        } else {
            expected.min(self.threads)
        };
        if arrived < expected_lanes {
            return Ok(false);
        }
        if arrived > expected {
            return fault(format!(
                "{arrived} threads arrived at barrier {id}, which waits for {expected}"
            ));
        }
        self.arrivals[id as usize] = 0;
        self.barriers += 1;
        self.shared.barrier();
        self.combine(warps, id);
        for warp in warps {
            warp.sequence = 1;
            for group in &mut warp.groups {
                if matches!(group.wait, Wait::Barrier { id: at, .. } if at == id) {
                    group.wait = Wait::Nothing;
                    group.at += 1;
                }
            }
        }
        Ok(true)
    }

    /// Writes the result of `bar.red` for every waiting thread.
    fn combine(&self, warps: &mut [Warp], id: u32) {
        let mut votes = Vec::new();
        for warp in warps.iter() {
            for group in warp
                .groups
                .iter()
                .filter(|g| matches!(g.wait, Wait::Barrier { id: at, .. } if at == id))
            {
                let i = &self.kernel.code[group.at as usize];
                votes.extend(
                    set(group.lanes).map(|lane| warp.file.predicate(i.slots[3]) >> lane & 1 == 1),
                );
            }
        }
        let count = votes.iter().filter(|&&v| v).count() as u32;
        for warp in warps {
            let Warp { groups, file, .. } = warp;
            for group in groups
                .iter()
                .filter(|g| matches!(g.wait, Wait::Barrier { id: at, .. } if at == id))
            {
                let i = &self.kernel.code[group.at as usize];
                let Action::Barrier(Barrier {
                    combine: Some(vote),
                    ..
                }) = i.action
                else {
                    continue;
                };
                match vote {
                    Vote::Count => file.write_words(i.slots[0], group.lanes, &[count; 32]),
                    Vote::All => file.write_predicate(
                        i.slots[0],
                        group.lanes,
                        mask(count as usize == votes.len()),
                    ),
                    _ => file.write_predicate(i.slots[0], group.lanes, mask(count > 0)),
                }
            }
        }
    }

    fn whereabouts(&self, warps: &[Warp]) -> String {
        let mut places: Vec<String> = Vec::new();
        for warp in warps {
            for group in &warp.groups {
                let line = self.kernel.places[group.at as usize].line;
                places.push(format!(
                    "warp {} lanes {:#010x} wait at line {line}",
                    warp.id, group.lanes
                ));
            }
            if warp.exited != 0 {
                places.push(format!(
                    "warp {} lanes {:#010x} have exited",
                    warp.id, warp.exited
                ));
            }
        }
        places.truncate(8);
        places.join(", ")
    }
}

fn mask(all: bool) -> u32 {
    if all { u32::MAX } else { 0 }
}
