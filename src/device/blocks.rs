//! Checks that every device makes before it copies blocks, so that an invalid list of copies is
//! rejected as a whole.

/// Checks that all blocks exist in a cache of `count` blocks. The error says what is wrong.
pub(super) fn check_blocks(
    mut blocks: impl Iterator<Item = u32>,
    count: usize,
) -> Result<(), String> {
    match blocks.find(|&block| block as usize >= count) {
        Some(block) => Err(format!(
            "block {block} is out of range: the cache has {count} blocks"
        )),
        None => Ok(()),
    }
}

/// Checks pairs of a source and a target block for a cache of `count` blocks. All blocks must
/// exist, and no target may occur again, as a source or as a target.
pub(super) fn check_copies(pairs: &[[u32; 2]], count: usize) -> Result<(), String> {
    check_blocks(pairs.iter().flatten().copied(), count)?;
    let mut targets: Vec<u32> = pairs.iter().map(|pair| pair[1]).collect();
    targets.sort_unstable();
    let twice = targets.windows(2).find(|pair| pair[0] == pair[1]);
    let clash = twice.map(|pair| pair[0]).or_else(|| {
        let mut sources = pairs.iter().map(|pair| pair[0]);
        sources.find(|source| targets.binary_search(source).is_ok())
    });
    match clash {
        Some(block) => Err(format!(
            "block {block} is a target and occurs again in the same list"
        )),
        None => Ok(()),
    }
}

/// Slots in host memory for swapped-out blocks: their size, and which of them hold a block.
pub(super) struct Slots {
    bytes: usize,
    written: Vec<bool>,
}

impl Slots {
    /// Creates `count` slots, each for a block of `bytes` bytes.
    pub(super) fn new(bytes: usize, count: usize) -> Self {
        Self {
            bytes,
            written: vec![false; count],
        }
    }

    /// Returns the number of bytes per slot.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the number of slots.
    pub(super) fn count(&self) -> usize {
        self.written.len()
    }

    /// Records that a slot holds a block.
    pub(super) fn set_written(&mut self, slot: u32) {
        if let Some(written) = self.written.get_mut(slot as usize) {
            *written = true;
        }
    }

    /// Checks pairs of a block and a slot, for a cache of `count` blocks of `bytes` bytes each.
    pub(super) fn check_out(
        &self,
        pairs: &[[u32; 2]],
        (count, bytes): (usize, usize),
    ) -> Result<(), String> {
        check_blocks(pairs.iter().map(|pair| pair[0]), count)?;
        self.check(pairs.iter().map(|pair| pair[1]), bytes)
    }

    /// Checks pairs of a slot and a block, for a cache of `count` blocks of `bytes` bytes each.
    /// The slots must hold a block.
    pub(super) fn check_in(
        &self,
        pairs: &[[u32; 2]],
        (count, bytes): (usize, usize),
    ) -> Result<(), String> {
        check_blocks(pairs.iter().map(|pair| pair[1]), count)?;
        let slots = pairs.iter().map(|pair| pair[0]);
        self.check(slots.clone(), bytes)?;
        match slots.into_iter().find(|&slot| !self.written[slot as usize]) {
            Some(slot) => Err(format!("host slot {slot} holds no block")),
            None => Ok(()),
        }
    }

    fn check(&self, mut slots: impl Iterator<Item = u32>, bytes: usize) -> Result<(), String> {
        if bytes != self.bytes {
            let own = self.bytes;
            return Err(format!("host slots have {own} bytes, blocks have {bytes}"));
        }
        let count = self.count();
        match slots.find(|&slot| slot as usize >= count) {
            Some(slot) => Err(format!(
                "host slot {slot} is out of range: there are {count} slots"
            )),
            None => Ok(()),
        }
    }
}
