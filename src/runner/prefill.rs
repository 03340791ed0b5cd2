//! The room for prefill: what rows lack of their tokens is looked up, taken from each other, and computed once.

use super::{Runner, Turn, common};
use crate::backends::has_page_kernels;
use crate::cache::page_len;
use crate::prefix::{Prefixes, Reuse, sources};
use crate::{CacheStorage, Error, KvCache, Result};

/// A row that lacks some of its tokens.
#[derive(Clone, Copy, Debug)]
pub struct Pending<'t> {
    /// The row.
    pub row: usize,
    /// All tokens that stand in its context.
    pub tokens: &'t [u32],
    /// How many of the first of them are a prompt, which others may begin with.
    pub prompt: usize,
}

impl Runner<'_> {
    /// Looks a row's tokens up in the cache of prefixes, all but the last `spare`; takes what is there, if it is more than is known
    /// of them already.
    pub fn look_up(&mut self, row: usize, tokens: &[u32], spare: usize) -> Result<()> {
        let Some(prefixes) = self.config.prefixes.clone() else { return Ok(()) };
        let lease = prefixes.take(tokens, tokens.len().saturating_sub(spare));
        if lease.tokens() <= self.known(row, tokens) {
            return Ok(());
        }
        self.multi_step = None;
        self.make_cache()?;
        self.truncate(row, 0)?;
        let (mut copied, mut parts) = (0, lease.parts.as_slice());
        if let Some((from, shared)) = self.row_to_share(row, tokens) {
            // Whole parts of what was found, of which the others are behind them.
            while let Some(((_, len), rest)) = parts.split_first().filter(|((_, len), _)| copied + len <= shared) {
                (copied, parts) = (copied + len, rest);
            }
            self.copy(from, &[row], copied)?;
        }
        let mut of_rows = vec![Vec::new(); self.rows()];
        of_rows[row] = parts.to_vec();
        self.with_room(|runner| match &mut runner.cache {
            Some(cache) => cache.append_segments(&of_rows),
            None => Ok(()),
        })?;
        self.held[row] = tokens[..lease.tokens()].to_vec();
        Ok(())
    }

    /// Does what takes pages, for which prefixes go that are not in use, if there are too few.
    pub(super) fn with_room<T>(&mut self, mut work: impl FnMut(&mut Self) -> Result<T>) -> Result<T> {
        loop {
            let done = work(self);
            let (Err(error @ Error::OutOfMemory { bytes, limit, .. }), Some(cache)) = (&done, &self.cache) else {
                return done;
            };
            if !KvCache::is_short(error) {
                return done;
            }
            let has_gone =
                |prefixes: &Prefixes| cache.let_go(bytes - limit, |is_over| prefixes.cache().evict_while(is_over));
            if !self.config.prefixes.as_ref().is_some_and(has_gone) {
                return done;
            }
        }
    }

    /// Another row whose pages a row can share, and how many of its tokens are in them.
    fn row_to_share(&self, row: usize, tokens: &[u32]) -> Option<(usize, usize)> {
        let is_paged = self.cache.as_ref().is_some_and(KvCache::is_paged);
        let others = (0..self.rows()).filter(|&other| is_paged && other != row);
        let known = others.map(|other| (other, self.known(other, tokens)));
        known.max_by_key(|(_, known)| *known).filter(|(_, known)| *known > 0)
    }

    /// Lets rows, in the order of their arrival, take what others have computed of their tokens, all but the last `spare`; says of
    /// each whether it has to wait for what another one will compute.
    ///
    /// With a cache of prefixes, what two rows begin with is computed by the first of them; in its [exact](Reuse::Exact) way, equal
    /// rows are one. Without such a cache it is so too, and a row of a [paged](CacheStorage::Paged) one, where who computes a token makes no
    /// difference to it, waits for another row that saves it a whole page.
    pub fn share(&mut self, pending: &[Pending<'_>], spare: usize) -> Result<Vec<bool>> {
        let reuse = self.config.prefixes.as_ref().map_or(Reuse::Exact, |prefixes| prefixes.cache().reuse());
        if pending.is_empty() || self.rows() < 2 {
            return Ok(vec![false; pending.len()]);
        }
        let mut is_pending = vec![false; self.rows()];
        pending.iter().for_each(|pending| is_pending[pending.row] = true);
        let others = (0..self.rows()).filter(|&row| !is_pending[row]);
        let rows: Vec<usize> = others.chain(pending.iter().map(|pending| pending.row)).collect();
        let first = rows.len() - pending.len();
        let tokens = |(index, &row): (usize, &usize)| match index.checked_sub(first) {
            Some(index) => pending[index].tokens,
            None => self.held[row].as_slice(),
        };
        let sequences: Vec<&[u32]> = rows.iter().enumerate().map(tokens).collect();
        let known: Vec<usize> = rows.iter().zip(&sequences).map(|(&row, tokens)| self.known(row, tokens)).collect();
        let mut found = sources(&sequences, &known, reuse, spare);
        if self.shares_pages() {
            let page_len = page_len(self.model.config().n_positions);
            let shared = sources(&sequences, &known, Reuse::Radix, spare).into_iter().zip(&known);
            let of_pages = shared.map(|(source, known)| source.filter(|source| source.tokens >= known + page_len));
            found = found.into_iter().zip(of_pages).map(|(found, of_pages)| found.or(of_pages)).collect();
        }
        let found = found.split_off(first);
        let mut waits = Vec::with_capacity(pending.len());
        for (pending, source) in pending.iter().zip(found) {
            let Some(source) = source else {
                waits.push(false);
                continue;
            };
            let from = rows[source.from];
            let is_there = common(&self.held[from], pending.tokens) >= source.tokens;
            if is_there {
                self.copy(from, &[pending.row], source.tokens)?;
            }
            waits.push(!is_there);
        }
        Ok(waits)
    }

    /// Whether rows take whole pages from each other without a cache of prefixes: that costs nothing, and who computes a token makes no
    /// difference to it.
    fn shares_pages(&self) -> bool {
        let is_exact = self.model.is_packed() && has_page_kernels(&self.model.device());
        let is_paged = self.config.uses_cache && self.config.cache.storage == CacheStorage::Paged;
        is_exact && is_paged && self.config.prefixes.is_none()
    }

    /// Computes all that rows lack, whose logits nobody wants.
    pub fn prefill(&mut self, pending: &[Pending<'_>]) -> Result<()> {
        for Pending { row, tokens, .. } in pending {
            self.look_up(*row, tokens, 0)?;
        }
        let mut left = pending.to_vec();
        while !left.is_empty() {
            let waits = self.share(&left, 0)?;
            let (waiting, going): (Vec<_>, Vec<_>) = left.into_iter().zip(waits).partition(|(_, waits)| *waits);
            let turns = going.iter().map(|(Pending { row, tokens, .. }, _)| Turn { row: *row, tokens, logits: 0 });
            self.forward(&turns.collect::<Vec<_>>())?;
            for (Pending { row, tokens, prompt }, _) in &going {
                self.insert(*row, &tokens[..*prompt]);
                self.mark(&tokens[..*prompt]);
            }
            left = waiting.into_iter().map(|(pending, _)| pending).collect();
        }
        Ok(())
    }

    /// Inserts what is known of a row's tokens into the cache of prefixes, if there is one. What the device does not hold as one buffer
    /// is left out: a cache need not have everything.
    pub fn insert(&self, row: usize, tokens: &[u32]) {
        let known = &tokens[..self.known(row, tokens)];
        if let (Some(prefixes), Some(cache)) = (&self.config.prefixes, &self.cache) {
            let _ = prefixes.insert(known, |new| cache.share(row, new));
        }
    }

    /// Notes in the cache of prefixes that these tokens are a whole prompt.
    pub fn mark(&self, tokens: &[u32]) {
        if let Some(prefixes) = &self.config.prefixes {
            prefixes.mark(tokens);
        }
    }
}
