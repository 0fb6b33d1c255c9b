//! Sectors of global memory: 32 bytes, the unit in which a GPU reads and writes it.

use super::LANES;
use std::collections::HashMap;

/// Bytes per sector.
pub const SECTOR: u64 = 32;

/// Returns the sectors of the lanes of `mask`, in ascending order and each once. An access never
/// crosses a sector, because it has at most 16 bytes and is aligned.
pub fn sectors(addresses: &[u64; LANES], mask: u32) -> impl Iterator<Item = u64> {
    let mut found = [0; LANES];
    let mut count = 0;
    for lane in (0..LANES).filter(|lane| mask >> lane & 1 == 1) {
        found[count] = addresses[lane] / SECTOR;
        count += 1;
    }
    found[..count].sort_unstable();
    let mut last = None;
    let all = found.into_iter().take(count);
    all.filter(move |sector| last.replace(*sector) != Some(*sector))
}

/// Sectors per page of a [`Touched`].
const PAGE: u64 = 64 * 64;

/// A set of sectors.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    /// Index in `pages` by page number.
    index: HashMap<u64, usize>,
    /// One bit per sector of a page.
    pages: Vec<Box<[u64; 64]>>,
    /// Number and index of the page used last.
    last: Option<(u64, usize)>,
}

impl Touched {
    pub fn insert(&mut self, sector: u64) {
        let (page, bit) = (sector / PAGE, sector % PAGE);
        let bits = self.page(page);
        bits[(bit / 64) as usize] |= 1 << (bit % 64);
    }

    fn page(&mut self, page: u64) -> &mut [u64; 64] {
        let at = match self.last {
            Some((last, at)) if last == page => at,
            _ => {
                let pages = &mut self.pages;
                *self.index.entry(page).or_insert_with(|| {
                    pages.push(Box::new([0; 64]));
                    pages.len() - 1
                })
            }
        };
        self.last = Some((page, at));
        &mut self.pages[at]
    }

    /// Adds the sectors of another set.
    pub fn merge(&mut self, other: &Touched) {
        for (&page, &at) in &other.index {
            for (to, from) in self.page(page).iter_mut().zip(other.pages[at].iter()) {
                *to |= from;
            }
        }
    }

    /// Returns the number of sectors.
    pub fn len(&self) -> u64 {
        let bits = self.pages.iter().flat_map(|page| page.iter());
        bits.map(|bits| u64::from(bits.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sector_of_a_request_is_listed_once() {
        let at = |of: fn(u64) -> u64| std::array::from_fn(|lane| of(lane as u64));
        let found = |addresses, mask| sectors(&addresses, mask).collect::<Vec<_>>();
        assert_eq!(found(at(|lane| 64 + lane * 4), u32::MAX), [2, 3, 4, 5]);
        assert_eq!(found(at(|lane| 1024 - lane * 32), 0b111), [30, 31, 32]);
        assert_eq!(found(at(|lane| lane % 2 * 4096), u32::MAX), [0, 128]);
        assert_eq!(found([0; LANES], 0), []);
    }

    #[test]
    fn a_set_holds_each_sector_once_however_it_was_added() {
        let (mut one, mut two) = (Touched::default(), Touched::default());
        for sector in [0, 1, 1, PAGE - 1, PAGE, 7 * PAGE + 5, 1] {
            one.insert(sector);
        }
        two.insert(1);
        two.insert(3 * PAGE);
        assert_eq!((one.len(), two.len()), (5, 2));
        one.merge(&two);
        assert_eq!(one.len(), 6);
    }
}
