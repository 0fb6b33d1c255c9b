//! What every device checks before it copies blocks, so that a copy is refused as a whole.

/// What is wrong with a list of blocks, for a cache of so many.
pub(super) fn check_blocks(
    mut blocks: impl Iterator<Item = u32>,
    count: usize,
) -> Result<(), String> {
    match blocks.find(|&block| block as usize >= count) {
        Some(block) => Err(format!("block {block} is beyond the cache's {count}")),
        None => Ok(()),
    }
}

/// What is wrong with pairs of a source and a target, for a cache of so many blocks.
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
        Some(block) => Err(format!("block {block} is written and used again")),
        None => Ok(()),
    }
}

/// The slots of host memory: how large they are, and which hold a block.
pub(super) struct Slots {
    bytes: usize,
    written: Vec<bool>,
}

impl Slots {
    /// So many slots, each for a block of so many bytes.
    pub(super) fn new(bytes: usize, count: usize) -> Self {
        Self {
            bytes,
            written: vec![false; count],
        }
    }

    /// Bytes of a slot.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.written.len()
    }

    /// Notes that a slot holds a block.
    pub(super) fn set_written(&mut self, slot: u32) {
        if let Some(written) = self.written.get_mut(slot as usize) {
            *written = true;
        }
    }

    /// What is wrong with pairs of a block and a slot, for a cache of so many blocks of so
    /// many bytes.
    pub(super) fn check_out(
        &self,
        pairs: &[[u32; 2]],
        (count, bytes): (usize, usize),
    ) -> Result<(), String> {
        check_blocks(pairs.iter().map(|pair| pair[0]), count)?;
        self.check(pairs.iter().map(|pair| pair[1]), bytes)
    }

    /// What is wrong with pairs of a slot and a block, likewise.
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
                "host slot {slot} is beyond the {count} that there are"
            )),
            None => Ok(()),
        }
    }
}
