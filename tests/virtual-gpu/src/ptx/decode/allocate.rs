//! Assigns the registers of a kernel to slots of the register file.
//!
//! PTX names a new register for nearly every value. Values that are never live at the same time
//! share a slot, so that the register file of a warp stays small and cache-friendly. Standard
//! liveness analysis finds which values those are. It is valid for each lane on its own, and no
//! lane reads a register of another lane after that lane has finished with it.

use super::{Draft, Virtual};
use crate::ptx::instruction::Action;
use crate::ptx::types::Class;

/// The layout of the register file.
pub struct File {
    /// Slot of each register: the index of a word for predicates, otherwise of a row of 32
    /// words.
    pub slots: Vec<u16>,
    /// Number of rows of the whole file.
    pub rows: usize,
}

/// Assigns a slot to every register. Returns `None` if there are too many. The registers in
/// `fixed` have a value from the beginning and keep it.
pub fn slots(drafts: &[Draft], classes: &[Class], fixed: &[Virtual]) -> Option<File> {
    let mut spans = live_spans(drafts, classes.len());
    for &register in fixed {
        spans[register as usize] = (0, u32::MAX);
    }
    let mut order: Vec<usize> = (0..classes.len())
        .filter(|&r| spans[r].0 <= spans[r].1)
        .collect();
    order.sort_unstable_by_key(|&r| spans[r]);
    // The pools of slots, one per class.
    let (mut predicates, mut words, mut wides) =
        (Pool::default(), Pool::default(), Pool::default());
    let mut places = vec![0; classes.len()];
    for register in order {
        let pool = match classes[register] {
            Class::Predicate => &mut predicates,
            Class::Word => &mut words,
            Class::Wide => &mut wides,
        };
        places[register] = pool.place(spans[register]);
    }
    let first_word = predicates.count.div_ceil(32).max(1);
    let first_wide = first_word + words.count.max(1);
    let rows = first_wide + 2 * wides.count.max(1);
    u16::try_from(rows).ok()?;
    let slot = |(place, class): (&usize, &Class)| match class {
        Class::Predicate => *place as u16,
        Class::Word => (first_word + place) as u16,
        Class::Wide => (first_wide + 2 * place) as u16,
    };
    Some(File {
        slots: places.iter().zip(classes).map(slot).collect(),
        rows,
    })
}

/// Slots of one class.
#[derive(Default)]
struct Pool {
    count: usize,
    /// Assigned slots, by the end of the live span that occupies them.
    busy: std::collections::BinaryHeap<std::cmp::Reverse<(u32, usize)>>,
}

impl Pool {
    fn place(&mut self, (begin, end): (u32, u32)) -> usize {
        let place = match self.busy.peek() {
            Some(&std::cmp::Reverse((before, place))) if before < begin => {
                self.busy.pop();
                place
            }
            _ => {
                self.count += 1;
                self.count - 1
            }
        };
        self.busy.push(std::cmp::Reverse((end, place)));
        place
    }
}

/// Returns the first and last position at which each register is live; an empty span if it
/// never is. A read counts as twice the index of its instruction and a write as one more, so
/// that an instruction may write to the slot that it reads from.
fn live_spans(drafts: &[Draft], registers: usize) -> Vec<(u32, u32)> {
    let blocks = blocks(drafts);
    let words = registers.div_ceil(64);
    // Registers that a block reads before it writes them, and registers that it writes.
    let mut needs = vec![vec![0u64; words]; blocks.len()];
    let mut gives = vec![vec![0u64; words]; blocks.len()];
    for (block, &(begin, end)) in blocks.iter().enumerate() {
        for draft in &drafts[begin..end] {
            let (writes, reads) = draft.operands.split_at(draft.writes);
            for &read in reads
                .iter()
                .chain(draft.guard.iter().map(|(guard, _)| guard))
            {
                if gives[block][read as usize / 64] >> (read % 64) & 1 == 0 {
                    needs[block][read as usize / 64] |= 1 << (read % 64);
                }
            }
            for &write in writes {
                if draft.guard.is_none() {
                    gives[block][write as usize / 64] |= 1 << (write % 64);
                } else if gives[block][write as usize / 64] >> (write % 64) & 1 == 0 {
                    // If the guard does not hold, the old value stays.
                    needs[block][write as usize / 64] |= 1 << (write % 64);
                }
            }
        }
    }
    let leaves = flow(drafts, &blocks, &mut needs, &gives);
    let mut spans = vec![(u32::MAX, 0); registers];
    let mut extend = |register: usize, at: u32| {
        let (begin, end) = &mut spans[register];
        *begin = (*begin).min(at);
        *end = (*end).max(at);
    };
    for (block, &(begin, end)) in blocks.iter().enumerate() {
        members(&needs[block]).for_each(|register| extend(register, 2 * begin as u32));
        members(&leaves[block]).for_each(|register| extend(register, 2 * end as u32));
        for (at, draft) in (begin..end).zip(&drafts[begin..end]) {
            let (writes, reads) = draft.operands.split_at(draft.writes);
            // These instructions may write a destination before they have read all sources, so
            // sources and destinations must not share slots.
            let together = draft.writes > 1 || !matches!(draft.action, Action::Lanes(_));
            for &read in reads
                .iter()
                .chain(draft.guard.iter().map(|(guard, _)| guard))
            {
                extend(read as usize, 2 * at as u32 + u32::from(together));
            }
            for &write in writes {
                extend(write as usize, 2 * at as u32 + u32::from(!together));
                extend(write as usize, 2 * at as u32 + 1);
            }
        }
    }
    spans
}

/// Splits the code into basic blocks, which are entered only at their beginning and left only
/// at their end.
fn blocks(drafts: &[Draft]) -> Vec<(usize, usize)> {
    let mut begins = vec![false; drafts.len() + 1];
    begins[0] = true;
    for (at, draft) in drafts.iter().enumerate() {
        match draft.action {
            Action::Branch(target) => {
                begins[target as usize] = true;
                begins[at + 1] = true;
            }
            Action::Exit => begins[at + 1] = true,
            _ => {}
        }
    }
    begins[drafts.len()] = true;
    let edges: Vec<usize> = (0..begins.len()).filter(|&at| begins[at]).collect();
    edges.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Completes the sets of registers that are live at the beginning of each block, and returns
/// the sets that are live at their ends.
fn flow(
    drafts: &[Draft],
    blocks: &[(usize, usize)],
    needs: &mut [Vec<u64>],
    gives: &[Vec<u64>],
) -> Vec<Vec<u64>> {
    let block_at = |at: usize| blocks.binary_search_by_key(&at, |block| block.0).ok();
    let next: Vec<[Option<usize>; 2]> = blocks
        .iter()
        .map(|&(_, end)| {
            let last = &drafts[end - 1];
            match last.action {
                Action::Branch(target) if last.guard.is_none() => [block_at(target as usize), None],
                Action::Branch(target) => [block_at(target as usize), block_at(end)],
                Action::Exit if last.guard.is_none() => [None, None],
                _ => [block_at(end), None],
            }
        })
        .collect();
    let mut leaves = vec![vec![0u64; needs.first().map_or(0, Vec::len)]; blocks.len()];
    let mut changed = true;
    while changed {
        changed = false;
        for block in (0..blocks.len()).rev() {
            for &follower in next[block].iter().flatten() {
                for word in 0..leaves[block].len() {
                    let more = needs[follower][word] & !leaves[block][word];
                    if more != 0 {
                        leaves[block][word] |= more;
                        needs[block][word] |= more & !gives[block][word];
                        changed = true;
                    }
                }
            }
        }
    }
    leaves
}

fn members(set: &[u64]) -> impl Iterator<Item = usize> {
    set.iter().enumerate().flat_map(|(word, &bits)| {
        (0..64)
            .filter(move |bit| bits >> bit & 1 == 1)
            .map(move |bit| word * 64 + bit)
    })
}
