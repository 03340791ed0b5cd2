//! [`PagePool`]: which pages of keys and values are whose.
//!
//! Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention* (2023), section 4: a sequence is a
//! list of pages of a fixed number of positions, several sequences refer to the same page, and whoever writes to what others see
//! copies it first. Nothing here holds a key or a value: a [`PageId`] says where they are.

use std::fmt;

/// Where the keys and values of some consecutive positions of a sequence are. The first one is nobody's: unused entries of a table
/// point there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(u32);

impl PageId {
    /// Its number, from 0 up: pages that were never taken have higher numbers than those that were.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Pages that several sequences share, each of [`page_len`](Self::page_len) positions.
///
/// A page has a `fill`: its positions below it hold tokens that somebody may see, and never change. One of the rows that refer to
/// a page has the right to append to it, at its fill; any other copies what it sees of it before its next token.
///
/// A step is whole: [`reserve`](Self::reserve) takes all pages of all its rows, or none. Then the copies that it asks for are
/// done, then the forward writes, and [`commit`](Self::commit) says of each row how many of its new tokens count.
///
/// ```
/// use gpt2_burn_core::pages::{PagePool, PageRow};
///
/// let mut pool = PagePool::new(64, 100);
/// let mut row = PageRow::default();
/// let copies = pool.reserve(&mut [(&mut row, 70)])?;
/// assert!(copies.is_empty());
/// pool.commit(&mut row, 70);
/// let mut other = pool.fork(&row); // copies nothing
/// assert_eq!(pool.used(), 2);
/// // Both go on: one of them where the tokens are, the other in a copy of the six in the second page.
/// let copies = pool.reserve(&mut [(&mut row, 1), (&mut other, 1)])?;
/// assert_eq!((copies.len(), copies[0].tokens, pool.used()), (1, 6, 3));
/// # Ok::<(), gpt2_burn_core::pages::Shortage>(())
/// ```
#[derive(Clone, Debug)]
pub struct PagePool {
    page_len: usize,
    max_pages: usize,
    pages: Vec<Page>,
    free: Vec<PageId>,
    /// Pages that are kept, each counted once.
    kept: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    refs: usize,
    /// How many of the references are not those of rows.
    kept: usize,
    fill: usize,
    /// Whether a row has the right to append to it.
    is_appended_to: bool,
}

/// A sequence: its tokens are at positions `0..len`, those of the i-th page at `page_len i..page_len (i + 1)`.
///
/// It does not know its pool: a row that is dropped, and not [released](PagePool::release), keeps its pages from being used again.
#[derive(Debug, Default)]
pub struct PageRow {
    pages: Vec<PageId>,
    len: usize,
    /// Whether it has the right to append to the page of its next token.
    may_append: bool,
}

impl PageRow {
    /// Tokens that it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its pages, those that are reserved for a step included.
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }
}

/// What is to be copied before a step writes: the first `tokens` positions of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The page that they are in.
    pub from: PageId,
    /// The page that they go to.
    pub to: PageId,
    /// How many.
    pub tokens: usize,
}

/// There are fewer pages than a step needs. Nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a step needs {needed} pages more, and {available} are left")]
pub struct Shortage {
    /// Pages that the step needs beside those that its rows have.
    pub needed: usize,
    /// Pages that are left.
    pub available: usize,
}

impl PagePool {
    /// A pool of up to `max_pages` pages of `page_len` positions, at least one.
    pub fn new(page_len: usize, max_pages: usize) -> Self {
        let max_pages = max_pages.min(u32::MAX as usize - 1);
        // Nobody's.
        let pages = vec![Page { refs: 1, ..Page::default() }];
        Self { page_len: page_len.max(1), max_pages, pages, free: Vec::new(), kept: 0 }
    }

    /// Positions of a page.
    pub fn page_len(&self) -> usize {
        self.page_len
    }

    /// Pages that somebody refers to.
    pub fn used(&self) -> usize {
        self.pages.len() - 1 - self.free.len()
    }

    /// Pages that were in use at once: so many have to be there, and the first one, which is nobody's.
    pub fn most_used(&self) -> usize {
        self.pages.len() - 1
    }

    /// Pages that several refer to.
    pub fn shared(&self) -> usize {
        self.pages.iter().skip(1).filter(|page| page.refs > 1).count()
    }

    /// Pages that can still be taken.
    pub fn available(&self) -> usize {
        self.max_pages - self.used()
    }

    /// How many refer to a page; 0 for one that is free.
    pub fn references(&self, page: PageId) -> usize {
        self.pages.get(page.index()).map_or(0, |page| page.refs)
    }

    /// Takes the pages for so many new tokens of each of these rows, and returns what is to be copied, in order and before
    /// anything else is written. The rows' lengths stay what they are until [`commit`](Self::commit).
    ///
    /// # Errors
    ///
    /// [`Shortage`] if there are not enough for all of them. Nothing is changed then.
    pub fn reserve(&mut self, rows: &mut [(&mut PageRow, usize)]) -> Result<Vec<PageCopy>, Shortage> {
        // What earlier steps reserved and did not need goes back first.
        let spare: usize = rows.iter().map(|(row, _)| row.pages.len() - row.len.div_ceil(self.page_len)).sum();
        let (needed, available) = (self.needed(rows), self.available());
        if needed > available + spare {
            return Err(Shortage { needed: needed - spare, available });
        }
        rows.iter_mut().for_each(|(row, _)| self.shrink(row));
        let used = self.used();
        let mut copies = Vec::new();
        for (row, new) in rows.iter_mut().filter(|(_, new)| *new > 0) {
            match row.len % self.page_len {
                0 => {}
                tokens => copies.extend(self.make_appendable(row, tokens)),
            }
            while row.pages.len() < row.len.saturating_add(*new).div_ceil(self.page_len) {
                let page = self.take();
                if row.pages.len() == row.len / self.page_len {
                    row.may_append = true;
                    self.pages[page.index()].is_appended_to = true;
                }
                row.pages.push(page);
            }
        }
        debug_assert_eq!(self.used() - used, needed, "pages that were reckoned");
        Ok(copies)
    }

    /// Pages that a step of so many new tokens of each of these rows needs beside those that hold the rows' tokens.
    pub fn needed(&self, rows: &[(&mut PageRow, usize)]) -> usize {
        let mut refs = std::collections::HashMap::new();
        let mut taken = std::collections::HashSet::new();
        let mut needed = 0_usize;
        for (row, new) in rows.iter().filter(|(_, new)| *new > 0) {
            let held = row.len.div_ceil(self.page_len);
            needed = needed.saturating_add(row.len.saturating_add(*new).div_ceil(self.page_len) - held);
            if row.len.is_multiple_of(self.page_len) || row.may_append {
                continue;
            }
            let tail = row.pages[held - 1];
            let page = &self.pages[tail.index()];
            let refs = refs.entry(tail).or_insert(page.refs);
            let is_taken = page.is_appended_to || taken.contains(&tail);
            let is_at_fill = page.fill == row.len % self.page_len;
            if *refs == 1 || is_at_fill && !is_taken {
                taken.insert(tail);
            } else {
                *refs -= 1;
                needed = needed.saturating_add(1);
            }
        }
        needed
    }

    /// Makes a row one that appends to the page in which it has `tokens` tokens, if need be in a copy.
    fn make_appendable(&mut self, row: &mut PageRow, tokens: usize) -> Option<PageCopy> {
        let tail = row.len / self.page_len;
        let from = row.pages[tail];
        let page = &mut self.pages[from.index()];
        if row.may_append {
            return None;
        }
        row.may_append = true;
        if page.refs == 1 || page.fill == tokens && !page.is_appended_to {
            // Nobody else sees what it has beyond.
            (page.fill, page.is_appended_to) = (tokens, true);
            return None;
        }
        page.refs -= 1;
        let to = self.take();
        let page = &mut self.pages[to.index()];
        (page.fill, page.is_appended_to) = (tokens, true);
        row.pages[tail] = to;
        Some(PageCopy { from, to, tokens })
    }

    /// Says that the next `tokens` of the tokens that were reserved for a row count. Those behind them may follow in the
    /// same step: their pages go back with [`commit`](Self::commit), or when the next step is reserved.
    pub fn advance(&mut self, row: &mut PageRow, tokens: usize) {
        if !row.may_append {
            return;
        }
        let room = row.pages.len() * self.page_len - row.len;
        let (before, after) = (row.len, row.len + tokens.min(room));
        for index in before / self.page_len..after.div_ceil(self.page_len) {
            let page = &mut self.pages[row.pages[index].index()];
            page.fill = (after - index * self.page_len).min(self.page_len);
            page.is_appended_to = page.fill < self.page_len;
        }
        row.len = after;
        match row.pages.get(after / self.page_len) {
            Some(page) => self.pages[page.index()].is_appended_to = true,
            None => row.may_append = false,
        }
    }

    /// Says that the first `tokens` of the tokens that were reserved for a row count, and no others: pages without one go back.
    pub fn commit(&mut self, row: &mut PageRow, tokens: usize) {
        self.advance(row, tokens);
        self.shrink(row);
    }

    /// Forgets the tokens of a row beyond the first `len`; nothing is copied.
    pub fn truncate(&mut self, row: &mut PageRow, len: usize) {
        if len >= row.len {
            return;
        }
        self.give_right_back(row);
        row.len = len;
        self.shrink(row);
    }

    /// Another row of the same tokens; nothing is copied.
    pub fn fork(&mut self, row: &PageRow) -> PageRow {
        self.row_of(&row.pages[..row.len.div_ceil(self.page_len)], row.len)
    }

    /// A row whose first `len` tokens are in these pages, which somebody refers to.
    ///
    /// # Panics
    ///
    /// If the pages do not hold so many, or are nobody's.
    pub fn row_of(&mut self, pages: &[PageId], len: usize) -> PageRow {
        let pages = &pages[..len.div_ceil(self.page_len)];
        self.refer(pages);
        PageRow { pages: pages.to_vec(), len, may_append: false }
    }

    /// Keeps these pages, of which there may be no row, until as many calls of [`give_up`](Self::give_up).
    ///
    /// # Panics
    ///
    /// If a page is nobody's.
    pub fn keep(&mut self, pages: &[PageId]) {
        self.refer(pages);
        for page in pages {
            let kept = &mut self.pages[page.index()].kept;
            *kept += 1;
            self.kept += usize::from(*kept == 1);
        }
    }

    /// Keeps these pages no longer.
    ///
    /// # Panics
    ///
    /// If a page is not kept.
    pub fn give_up(&mut self, pages: &[PageId]) {
        for page in pages {
            let kept = &mut self.pages[page.index()].kept;
            assert!(*kept > 0, "page {} is not kept", page.index());
            *kept -= 1;
            self.kept -= usize::from(*kept == 0);
        }
        self.give_back(pages);
    }

    /// Pages that are [kept](Self::keep), those included that rows refer to, too.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// Pages that are kept, and that no row refers to.
    pub fn idle(&self) -> usize {
        self.pages.iter().filter(|page| page.kept > 0 && page.kept == page.refs).count()
    }

    /// One more refers to each of these pages.
    fn refer(&mut self, pages: &[PageId]) {
        for page in pages {
            let refs = &mut self.pages[page.index()].refs;
            assert!(page.index() > 0 && *refs > 0, "page {} is nobody's", page.index());
            *refs += 1;
        }
    }

    /// One less refers to each of these pages; those to which nobody does can be taken again.
    fn give_back(&mut self, pages: &[PageId]) {
        for id in pages {
            let page = &mut self.pages[id.index()];
            assert!(id.index() > 0 && page.refs > 0, "page {} is nobody's", id.index());
            page.refs -= 1;
            if page.refs == 0 {
                *page = Page::default();
                self.free.push(*id);
            }
        }
    }

    /// Empties a row.
    pub fn release(&mut self, row: &mut PageRow) {
        self.give_right_back(row);
        self.give_back(&row.pages);
        *row = PageRow::default();
    }

    /// From which position on each page may hold what a forward wrote for a row and did not commit: whoever computes with whole
    /// pages has to wipe that before others use them.
    pub fn uncommitted(&self, row: &PageRow) -> Vec<(PageId, usize)> {
        let written = if row.may_append { &row.pages[row.len / self.page_len..] } else { &[] };
        written.iter().map(|page| (*page, self.pages[page.index()].fill)).collect()
    }

    fn take(&mut self) -> PageId {
        let page = self.free.pop().unwrap_or_else(|| {
            self.pages.push(Page::default());
            PageId((self.pages.len() - 1) as u32)
        });
        self.pages[page.index()] = Page { refs: 1, ..Page::default() };
        page
    }

    /// Gives pages back that hold no token of a row; in its last one, if that is full, there is nothing to append to.
    fn shrink(&mut self, row: &mut PageRow) {
        let spare = row.pages.split_off(row.len.div_ceil(self.page_len));
        self.give_back(&spare);
        row.may_append &= !row.len.is_multiple_of(self.page_len);
    }

    fn give_right_back(&mut self, row: &mut PageRow) {
        if std::mem::take(&mut row.may_append) {
            let page = row.pages[row.len / self.page_len];
            self.pages[page.index()].is_appended_to = false;
        }
    }

    /// Whether everything fits together, if these rows are all that there are, and `kept` has a page for each time that it is kept;
    /// says what does not. For tests, and debug builds.
    pub fn check<'r>(&self, rows: impl IntoIterator<Item = &'r PageRow>, kept: &[PageId]) -> Result<(), String> {
        let (mut refs, mut appending) = (vec![0; self.pages.len()], vec![0; self.pages.len()]);
        kept.iter().for_each(|page| refs[page.index()] += 1);
        let times_kept = refs.clone();
        if self.kept != times_kept.iter().filter(|times| **times > 0).count() {
            return Err(format!("not {} pages are kept", self.kept));
        }
        refs[0] = 1;
        for row in rows {
            row.pages.iter().for_each(|page| refs[page.index()] += 1);
            for (index, page) in row.pages.iter().enumerate() {
                let seen = row.len.saturating_sub(index * self.page_len).min(self.page_len);
                let fill = self.pages[page.index()].fill;
                if seen > fill {
                    return Err(format!("a row sees {seen} positions of page {}, which has {fill}", page.index()));
                }
            }
            if row.may_append {
                appending[row.pages[row.len / self.page_len].index()] += 1;
            }
        }
        for (index, page) in self.pages.iter().enumerate() {
            let is_free = self.free.contains(&PageId(index as u32));
            let found = (page.refs, page.kept, usize::from(page.is_appended_to), page.refs == 0);
            if found != (refs[index], times_kept[index], appending[index], is_free) || page.fill > self.page_len {
                return Err(format!(
                    "page {index}: {page:?}, and {} refer to it, {} append",
                    refs[index], appending[index]
                ));
            }
        }
        if self.used() > self.max_pages { Err(format!("{self} is more than {}", self.max_pages)) } else { Ok(()) }
    }
}

impl fmt::Display for PagePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages, {} of them shared", self.used(), self.shared())
    }
}
