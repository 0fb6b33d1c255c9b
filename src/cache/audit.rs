//! Checks that the block accounting is consistent, by recounting everything.

use super::prefix::PrefixCache;
use super::{AccountingError, BlockCache, BlockCounts, BlockId, BlockState, BlockTable, GroupKind};

impl BlockCache {
    /// Checks I3 against the tables of all holders. Each block must be free, cached, deferred
    /// or referenced, and its reference count must be the number of tables that hold it. The
    /// rules that the prefix cache relies on are checked, too.
    ///
    /// # Errors
    /// Returns [`AccountingError`] with a description of the first inconsistency.
    pub fn audit<'a>(
        &self,
        tables: impl Iterator<Item = &'a BlockTable>,
    ) -> Result<BlockCounts, AccountingError> {
        let counts = self.counts();
        if counts.free + counts.referenced + counts.cached + counts.deferred != counts.total {
            return Err(AccountingError(format!("{counts:?} does not add up")));
        }
        let mut held = vec![0u32; counts.total];
        let mut slots = vec![0u32; self.state_counts().total];
        for table in tables {
            for slot in table.states.slots() {
                match slots.get_mut(slot.index()) {
                    Some(count) => *count += 1,
                    None => return Err(AccountingError(format!("a table holds {slot:?}"))),
                }
            }
            for block in table.blocks() {
                match held.get_mut(block.index()) {
                    Some(count) => *count += 1,
                    None => {
                        return Err(AccountingError(format!(
                            "a table holds {block:?} of {counts:?}"
                        )));
                    }
                }
            }
            self.audit_groups(table).map_err(AccountingError)?;
            self.audit_published(table).map_err(AccountingError)?;
        }
        self.pool.audit(&held).map_err(AccountingError)?;
        if let Some(states) = &self.states {
            let audited = states.audit(&slots, &self.prefix);
            audited.map_err(AccountingError)?;
        }
        self.audit_deferred().map_err(AccountingError)?;
        self.audit_prefixes().map_err(AccountingError)?;
        Ok(counts)
    }

    /// Checks that groups that need all tokens have all blocks, and that no group has a block
    /// of which they have none.
    fn audit_groups(&self, table: &BlockTable) -> Result<(), String> {
        let groups = || self.layout.groups().iter().zip(&table.groups);
        let mut full = groups().filter(|(group, _)| group.kind == GroupKind::Full);
        if let Some((_, held)) = full.clone().find(|(_, held)| held.first != 0) {
            return Err(format!(
                "the first {} blocks of a group that needs all tokens were given back",
                held.first
            ));
        }
        let Some((_, all)) = full.next() else {
            return Ok(());
        };
        match groups().find(|(_, held)| held.range().end > all.range().end) {
            Some((group, held)) => Err(format!(
                "a table holds blocks {:?} for {:?}, but {:?} for layers that need all tokens",
                held.range(),
                group.kind,
                all.range()
            )),
            None => Ok(()),
        }
    }

    /// Checks that a table holds the published blocks of its tokens and no others, and that they
    /// have its salt.
    fn audit_published(&self, table: &BlockTable) -> Result<(), String> {
        let Some(prefix) = &self.prefix else {
            return Ok(());
        };
        // If all layers have windows, the blocks of the last node may have been given back and
        // evicted.
        let mut node = table.last.filter(|last| prefix.exists(*last));
        for index in (0..table.published).rev() {
            let Some(current) = node else {
                let mut groups = table.groups.iter();
                let held = groups.any(|held| held.get(index).is_some());
                return match self.needs_all_tokens() || held {
                    true => Err(format!("nobody knows published block {index} of a table")),
                    false => Ok(()),
                };
            };
            for (group, held) in table.groups.iter().enumerate() {
                let (held, known) = (held.get(index), prefix.block(current, group));
                if held.is_some() && held != known {
                    return Err(format!(
                        "a table holds {held:?} as its published block {index}, but {known:?} is \
                         known"
                    ));
                }
            }
            if index == 0 && prefix.salt(current) != table.salt() {
                return Err(format!("{current:?} is shared across salts"));
            }
            node = prefix.parent(current);
        }
        Ok(())
    }

    /// Returns whether there is a group whose layers need all tokens.
    fn needs_all_tokens(&self) -> bool {
        let mut groups = self.layout.groups().iter();
        groups.any(|group| group.kind == GroupKind::Full)
    }

    /// Checks that the fence will settle every deferred block.
    fn audit_deferred(&self) -> Result<(), String> {
        let mut awaited = vec![false; self.pool.total_blocks()];
        for block in self.fence.iter() {
            awaited[block.index()] = true;
        }
        for (index, awaited) in awaited.into_iter().enumerate() {
            if self.pool.state(BlockId(index as u32)) == BlockState::Deferred && !awaited {
                return Err(format!("block {index} is deferred forever"));
            }
        }
        Ok(())
    }

    /// Checks that cached blocks are known and free ones are not, and that the block that a
    /// known block follows is known and is evicted after it.
    fn audit_prefixes(&self) -> Result<(), String> {
        let Some(prefix) = &self.prefix else {
            let cached = self.pool.cached_blocks();
            return match cached {
                0 => Ok(()),
                _ => Err(format!(
                    "{cached} blocks are cached, but there is no prefix cache"
                )),
            };
        };
        prefix.audit()?;
        for index in 0..self.pool.total_blocks() as u32 {
            let (block, state) = (BlockId(index), self.pool.state(BlockId(index)));
            let wrong = match prefix.knows(block) {
                true => state == BlockState::Free,
                false => state == BlockState::Cached,
            };
            if wrong {
                let known = prefix.node_of(block);
                return Err(format!("{block:?} is {state:?}, but is known at {known:?}"));
            }
        }
        self.audit_order(prefix)
    }

    /// Checks that, in groups that need all tokens, the block before a known block is known and
    /// is evicted after it.
    fn audit_order(&self, prefix: &PrefixCache) -> Result<(), String> {
        let mut order = vec![usize::MAX; self.pool.total_blocks()];
        for (place, block) in self.pool.cached().enumerate() {
            order[block.index()] = place;
        }
        for node in prefix.nodes() {
            for (group, kind) in self.layout.groups().iter().enumerate() {
                if kind.kind != GroupKind::Full {
                    continue;
                }
                let Some(block) = prefix.block(node, group) else {
                    return Err(format!("{node:?} has no block of group {group}"));
                };
                let parent = prefix.parent(node);
                let before = parent.map(|parent| prefix.block(parent, group));
                let kept = |before: BlockId| order[before.index()] >= order[block.index()];
                if before.is_some_and(|before| !before.is_some_and(kept)) {
                    return Err(format!(
                        "{block:?} is known after {before:?}, which is evicted earlier"
                    ));
                }
            }
        }
        Ok(())
    }
}
