//! How caches that take pages from one pool wait for each other, and make room.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::slabs::Slabs;
use super::{Held, KvCache, WHAT};
use crate::{Error, Threads};

impl KvCache {
    /// Does what reads or writes the memory of pages. Where other caches take pages from the same pool, they take turns, and each
    /// computes on threads apart from those that wait for theirs.
    pub(crate) fn in_turn<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> T + Send) -> T {
        let pool = match &self.held {
            Held::Pages(pages) => pages.to_wait_for(),
            Held::Buffers(_) => None,
        };
        let Some(pool) = pool else { return work(self) };
        let mut slabs = pool.slabs();
        self.turn(&mut slabs);
        let done = catch_unwind(AssertUnwindSafe(|| Threads::apart(|| work(self))));
        self.turn(&mut slabs);
        done.unwrap_or_else(|panic| {
            pool.set_broken();
            resume_unwind(panic)
        })
    }

    fn turn(&mut self, slabs: &mut Slabs) {
        if let Held::Pages(pages) = &mut self.held {
            pages.turn(slabs);
        }
    }

    /// Whether an error says that there is too little memory for a cache: less of it may do.
    pub(crate) fn is_short(error: &Error) -> bool {
        matches!(error, Error::OutOfMemory { what: WHAT, .. })
    }

    /// Whether another row of so many tokens has room, if those go that others keep.
    pub(crate) fn has_room(&self, tokens: usize) -> bool {
        match &self.held {
            Held::Buffers(_) => true,
            Held::Pages(pages) => pages.has_room(tokens, self.config.limit),
        }
    }

    /// Lets others give back pages of the pool that they share with this cache, until there are so many bytes more, with `give_back`, which
    /// does so while what it is given says that there are fewer; returns whether a page came of it.
    pub(crate) fn let_go(&self, bytes: usize, give_back: impl FnOnce(&mut dyn FnMut() -> bool)) -> bool {
        let Held::Pages(pages) = &self.held else { return false };
        let before = pages.counts().used;
        let wanted = before.saturating_sub(pages.pages_of(bytes).max(1));
        give_back(&mut || pages.counts().used > wanted);
        pages.counts().used < before
    }
}
