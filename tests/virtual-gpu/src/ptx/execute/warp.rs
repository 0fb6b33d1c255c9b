//! A warp: its groups of lanes, and the exchanges between lanes.

use super::copies::Pending;
use super::registers::Registers;
use super::{Block, Flow, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{Action, Instruction, LANES, Reduce, Shuffle, Vote};
use crate::ptx::kernel::{Kernel, Preset};
use crate::ptx::run::Launch;
use crate::ptx::shared::{LAST_SEQUENCE, Visitor};
use crate::ptx::types::Class;

/// Lanes at the same position in the code.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub at: u32,
    pub lanes: u32,
    pub wait: Wait,
}

/// What a group waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    Nothing,
    /// Other lanes of its warp, at the group's instruction.
    Lanes,
    /// A barrier of the block, for `count` of its threads; 0 means all.
    Barrier {
        id: u32,
        count: u32,
    },
}

/// A warp of a block.
pub struct Warp {
    pub id: u32,
    pub file: Registers,
    pub groups: Vec<Group>,
    /// Lanes that exist in the block.
    pub exists: u32,
    pub exited: u32,
    pub executed: u64,
    /// Number of orderings between the lanes' accesses to shared memory so far.
    pub sequence: u32,
    /// Index of the region of the last access to global memory.
    pub hint: usize,
    pub pending: Vec<Box<Pending>>,
    /// Number of copy groups that each lane has committed.
    pub committed: [u32; LANES],
    /// Lanes that have waited for the kernels before this one.
    pub waited: u32,
    /// Local memory, lane after lane.
    pub local: Vec<u8>,
}

impl Warp {
    pub fn new(kernel: &Kernel, id: u32) -> Self {
        Warp {
            id,
            file: Registers::new(kernel.rows),
            groups: Vec::new(),
            exists: 0,
            exited: 0,
            executed: 0,
            sequence: 1,
            hint: 0,
            pending: Vec::new(),
            committed: [0; LANES],
            waited: 0,
            local: vec![0; kernel.local * LANES],
        }
    }

    /// Prepares for a block, with all lanes at the beginning of the code.
    pub fn begin(&mut self, kernel: &Kernel, launch: &Launch, block: [u32; 3]) {
        let threads: u32 = launch.block.iter().product();
        let count = threads.saturating_sub(self.id * 32).min(32);
        self.exists = if count == 32 {
            u32::MAX
        } else {
            (1 << count) - 1
        };
        self.groups.clear();
        self.groups.push(Group {
            at: 0,
            lanes: self.exists,
            wait: Wait::Nothing,
        });
        self.exited = 0;
        self.executed = 0;
        self.sequence = 1;
        self.pending.clear();
        self.committed = [0; LANES];
        self.waited = 0;
        self.file.clear();
        for &(slot, class, bits) in &kernel.constants {
            match class {
                Class::Predicate => self.file.write_predicate(slot, u32::MAX, bits as u32),
                Class::Word => *self.file.words_of_slot_mut(slot) = [bits as u32; LANES],
                Class::Wide => *self.file.wides_mut(slot) = [bits; LANES],
            }
        }
        for &(preset, slot) in &kernel.presets {
            if preset == Preset::DynamicSharedWide {
                *self.file.wides_mut(slot) = [kernel.dynamic_shared_at as u64; LANES];
                continue;
            }
            let mut values = [0; LANES];
            for (lane, value) in values.iter_mut().enumerate() {
                *value = self.preset(kernel, launch, block, preset, lane as u32);
            }
            *self.file.words_of_slot_mut(slot) = values;
        }
    }

    fn preset(
        &self,
        kernel: &Kernel,
        launch: &Launch,
        block: [u32; 3],
        preset: Preset,
        lane: u32,
    ) -> u32 {
        let [x, y, _] = launch.block;
        let thread = self.id * 32 + lane;
        let (equal, less) = (1u32 << lane, (1u32 << lane) - 1);
        match preset {
            Preset::Thread(0) => thread % x,
            Preset::Thread(1) => thread / x % y,
            Preset::Thread(_) => thread / x / y,
            Preset::BlockSize(axis) => launch.block[usize::from(axis)],
            Preset::Block(axis) => block[usize::from(axis)],
            Preset::Grid(axis) => launch.grid[usize::from(axis)],
            Preset::Lane => lane,
            Preset::Warp => self.id,
            Preset::Warps => launch.block.iter().product::<u32>().div_ceil(32),
            Preset::MaskEqual => equal,
            Preset::MaskLess => less,
            Preset::MaskLessEqual => less | equal,
            Preset::MaskGreater => !(less | equal),
            Preset::MaskGreaterEqual => !less,
            Preset::DynamicSize => launch.dynamic_shared as u32,
            Preset::DynamicShared | Preset::DynamicSharedWide => kernel.dynamic_shared_at as u32,
        }
    }

    /// Merges groups at the same position, and returns the lowest group that does not wait.
    pub fn choose(&mut self) -> Option<usize> {
        let is_waiting = |group: &Group| matches!(group.wait, Wait::Barrier { .. });
        let mut at = 0;
        while at < self.groups.len() {
            let group = self.groups[at];
            let mut other = at + 1;
            while other < self.groups.len() {
                let meets = self.groups[other].at == group.at;
                if meets && !is_waiting(&group) && !is_waiting(&self.groups[other]) {
                    let joined = self.groups.remove(other);
                    self.groups[at].lanes |= joined.lanes;
                    self.groups[at].wait = Wait::Nothing;
                } else {
                    other += 1;
                }
            }
            at += 1;
        }
        let ready = self
            .groups
            .iter()
            .enumerate()
            .filter(|(_, g)| g.wait == Wait::Nothing);
        ready.min_by_key(|(_, g)| g.at).map(|(at, _)| at)
    }

    /// Returns the next position at which the chosen group meets another.
    pub fn limit(&self, chosen: usize) -> usize {
        let mine = self.groups[chosen].at;
        let others = self
            .groups
            .iter()
            .filter(|g| g.at > mine && !matches!(g.wait, Wait::Barrier { .. }));
        others.map(|g| g.at as usize).min().unwrap_or(usize::MAX)
    }

    /// Returns the position of a group that waits for lanes. Called when no group can run.
    pub fn stuck(&self) -> Option<usize> {
        self.groups
            .iter()
            .find(|g| g.wait == Wait::Lanes)
            .map(|g| g.at as usize)
    }

    /// Returns the fault of a group that waits for lanes that never arrive.
    pub fn missing_lanes(&self, kernel: &Kernel) -> Box<Stop> {
        let Some(group) = self.groups.iter().find(|g| g.wait == Wait::Lanes) else {
            return Stop::new(FaultKind::DivergentWarp, "lanes wait for each other");
        };
        let kind = match kernel.code[group.at as usize].action {
            Action::Barrier(_) => FaultKind::DivergentBarrier,
            _ => FaultKind::DivergentWarp,
        };
        let mut detail = format!(
            "lanes {:#010x} wait for the other lanes of the warp,",
            group.lanes
        );
        for other in self.groups.iter().filter(|g| g.lanes != group.lanes) {
            let line = kernel.places[other.at as usize].line;
            detail += &format!(" but lanes {:#010x} wait at line {line}", other.lanes);
        }
        if self.exited != 0 {
            detail += &format!(" but lanes {:#010x} have exited", self.exited);
        }
        Stop::new(kind, detail).at_lane(group.lanes.trailing_zeros() as usize)
    }

    /// Returns whether all lanes of `needed` execute this instruction now. It is a fault if
    /// some never will.
    pub fn gathered(&self, lanes: u32, active: u32, needed: u32) -> Outcome<bool> {
        let missing = needed & !active;
        if missing == 0 {
            return Ok(true);
        }
        let gone = missing & (self.exited | !self.exists);
        let skipping = missing & lanes;
        let why = if gone & self.exists != 0 {
            format!("lanes {:#010x} have exited", gone & self.exists)
        } else if gone != 0 {
            format!("the block has no lanes {gone:#010x} in this warp")
        } else if skipping != 0 {
            format!("lanes {skipping:#010x} skip it, because of its guard")
        } else {
            return Ok(false);
        };
        let detail = format!("lanes {needed:#010x} must execute this together, but {why}");
        Err(Stop::new(FaultKind::DivergentWarp, detail).at_lane(active.trailing_zeros() as usize))
    }

    pub fn visitor(&self, lane: usize, at: usize, atomic: bool) -> Visitor {
        Visitor {
            warp: self.id,
            lane: lane as u32,
            sequence: self.sequence,
            at: at as u32,
            atomic,
        }
    }
}

impl Block<'_> {
    /// Executes an operation among the lanes of a member mask.
    pub(super) fn collective(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        lanes: u32,
        active: u32,
    ) -> Outcome<Flow> {
        let mask_slot = match i.action {
            Action::WarpBarrier => i.slots[0],
            Action::Shuffle(_) => i.slots[5],
            Action::Match { .. } => i.slots[3],
            _ => i.slots[2],
        };
        let members = *warp.file.words(mask_slot);
        let mut needed = 0;
        for lane in set(active) {
            needed |= members[lane];
            if members[lane] >> lane & 1 == 0 {
                let detail = format!(
                    "the member mask {:#010x} does not name the lane itself",
                    members[lane]
                );
                return Err(Stop::new(FaultKind::DivergentWarp, detail).at_lane(lane));
            }
        }
        if !warp.gathered(lanes, active, needed)? {
            return Ok(Flow::Lanes);
        }
        warp.sequence += 1;
        if warp.sequence > LAST_SEQUENCE {
            warp.sequence = 1;
            self.shared.forget(warp.id);
        }
        match i.action {
            Action::Shuffle(mode) => shuffle(warp, i, mode, &members, active)?,
            Action::Vote(vote) => vote_lanes(warp, i, vote, &members, active),
            Action::Match { all, wide } => match_lanes(warp, i, all, wide, &members, active),
            Action::Reduce(reduce) => reduce_lanes(warp, i, reduce, &members, active),
            _ => {}
        }
        Ok(Flow::Next)
    }
}

/// Iterates over the lanes of a mask in ascending order.
pub fn set(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros();
        rest &= rest.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

/// `shfl.sync`, following the pseudocode in the PTX manual.
fn shuffle(
    warp: &mut Warp,
    i: &Instruction,
    mode: Shuffle,
    members: &[u32; LANES],
    active: u32,
) -> Outcome<()> {
    let (a, b, c) = (
        *warp.file.words(i.slots[2]),
        *warp.file.words(i.slots[3]),
        *warp.file.words(i.slots[4]),
    );
    let (mut values, mut inside) = ([0; LANES], 0u32);
    let is_whole = active == u32::MAX && c == [31; LANES] && *members == [u32::MAX; LANES];
    if mode == Shuffle::Butterfly && is_whole && b == [b[0]; LANES] {
        // Fast path for the usual way to combine all lanes.
        for (lane, value) in values.iter_mut().enumerate() {
            *value = a[lane ^ (b[0] & 31) as usize];
        }
        warp.file.write_words(i.slots[0], active, &values);
        warp.file.write_predicate(i.slots[1], active, u32::MAX);
        return Ok(());
    }
    for lane in set(active) {
        let (offset, clamp, segment) = (b[lane] & 31, c[lane] & 31, c[lane] >> 8 & 31);
        let here = lane as u32;
        let highest = here & segment | clamp & !segment;
        let lowest = here & segment;
        let (source, is_inside) = match mode {
            Shuffle::Up => (
                here.wrapping_sub(offset),
                here as i32 - offset as i32 >= highest as i32,
            ),
            Shuffle::Down => (here + offset, here + offset <= highest),
            Shuffle::Butterfly => (here ^ offset, here ^ offset <= highest),
            Shuffle::Index => {
                let source = lowest | offset & !segment;
                (source, source <= highest)
            }
        };
        let source = if is_inside { source } else { here };
        if members[lane] >> source & 1 == 0 {
            let detail = format!(
                "reads lane {source}, which its member mask {:#010x} does not name",
                members[lane]
            );
            return Err(Stop::new(FaultKind::DivergentWarp, detail).at_lane(lane));
        }
        values[lane] = a[source as usize];
        inside |= u32::from(is_inside) << lane;
    }
    warp.file.write_words(i.slots[0], active, &values);
    warp.file.write_predicate(i.slots[1], active, inside);
    Ok(())
}

fn vote_lanes(warp: &mut Warp, i: &Instruction, vote: Vote, members: &[u32; LANES], active: u32) {
    let bits = warp.file.predicate(i.slots[1]);
    let mut ballots = [0; LANES];
    let mut result = 0u32;
    for lane in set(active) {
        let yes = bits & members[lane];
        ballots[lane] = yes;
        let is_true = match vote {
            Vote::All => yes == members[lane],
            Vote::Any => yes != 0,
            Vote::Uniform => yes == 0 || yes == members[lane],
            Vote::Ballot | Vote::Count => false,
        };
        result |= u32::from(is_true) << lane;
    }
    match vote {
        Vote::Ballot => warp.file.write_words(i.slots[0], active, &ballots),
        _ => warp.file.write_predicate(i.slots[0], active, result),
    }
}

fn match_lanes(
    warp: &mut Warp,
    i: &Instruction,
    all: bool,
    wide: bool,
    members: &[u32; LANES],
    active: u32,
) {
    let values: [u64; LANES] = if wide {
        *warp.file.wides(i.slots[2])
    } else {
        warp.file.words(i.slots[2]).map(u64::from)
    };
    let (mut masks, mut predicate) = ([0; LANES], 0u32);
    for lane in set(active) {
        let equal = set(members[lane])
            .filter(|&other| values[other] == values[lane])
            .fold(0, |m, l| m | 1 << l);
        let is_all = equal == members[lane];
        masks[lane] = if all && !is_all { 0 } else { equal };
        predicate |= u32::from(is_all) << lane;
    }
    warp.file.write_words(i.slots[0], active, &masks);
    warp.file.write_predicate(i.slots[1], active, predicate);
}

fn reduce_lanes(
    warp: &mut Warp,
    i: &Instruction,
    reduce: Reduce,
    members: &[u32; LANES],
    active: u32,
) {
    let values = *warp.file.words(i.slots[1]);
    let mut results = [0; LANES];
    for lane in set(active) {
        let of_members = set(members[lane]).map(|l| values[l]);
        results[lane] = of_members.reduce(|a, b| combine(reduce, a, b)).unwrap_or(0);
    }
    warp.file.write_words(i.slots[0], active, &results);
}

fn combine(reduce: Reduce, a: u32, b: u32) -> u32 {
    match reduce {
        Reduce::Add => a.wrapping_add(b),
        Reduce::Min => a.min(b),
        Reduce::Max => a.max(b),
        Reduce::MinSigned => (a as i32).min(b as i32) as u32,
        Reduce::MaxSigned => (a as i32).max(b as i32) as u32,
        Reduce::And => a & b,
        Reduce::Or => a | b,
        Reduce::Xor => a ^ b,
    }
}
