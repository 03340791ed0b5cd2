//! [`Slab`]: pages that several threads read and write.
#![allow(unsafe_code)] // each thread writes other pages of one buffer, which slices cannot express

use std::marker::PhantomData;

/// `[P, H, elements of a head's part]`, of which threads write disjoint parts.
#[derive(Clone, Copy)]
pub struct Slab<'a, E> {
    start: *mut E,
    pages: usize,
    heads: usize,
    /// Elements of a page's part for a head.
    part: usize,
    borrow: PhantomData<&'a mut [E]>,
}

// SAFETY: it stands for a `&mut [E]` of which copies are with several threads, which read and write elements: they may be sent and
// shared. That threads do not write what others read or write is what the callers of `part` and `part_mut` promise.
unsafe impl<E: Send + Sync> Send for Slab<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Send + Sync> Sync for Slab<'_, E> {}

impl<'a, E> Slab<'a, E> {
    /// `elements` as pages of so many heads, of `part` elements each.
    pub fn new(elements: &'a mut [E], [heads, part]: [usize; 2]) -> Self {
        let (start, pages) = (elements.as_mut_ptr(), elements.len() / (heads * part).max(1));
        Self { start, pages, heads, part, borrow: PhantomData }
    }

    /// A head's part of a page.
    ///
    /// # Panics
    ///
    /// If there is no such page or head.
    ///
    /// # Safety
    ///
    /// While the slice is in use, [`part_mut`](Self::part_mut) may not be asked for the same part.
    pub unsafe fn part(&self, page: u32, head: usize) -> &'a [E] {
        // SAFETY: it is in the buffer, as `at` has checked; nobody writes it, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.at(page, head), self.part) }
    }

    /// The same to be written.
    ///
    /// # Panics
    ///
    /// If there is no such page or head.
    ///
    /// # Safety
    ///
    /// While the slice is in use, nobody else may ask for the same part.
    #[allow(clippy::mut_from_ref)] // as the section on safety says
    pub unsafe fn part_mut(&self, page: u32, head: usize) -> &'a mut [E] {
        // SAFETY: it is in the buffer, as `at` has checked; nobody else has it, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at(page, head), self.part) }
    }

    /// Where a head's part of a page begins.
    ///
    /// # Panics
    ///
    /// If there is no such page or head.
    pub fn at(&self, page: u32, head: usize) -> *mut E {
        let page = page as usize;
        assert!(page < self.pages && head < self.heads, "page {page} of {}, head {head} of {}", self.pages, self.heads);
        // SAFETY: with the page below `pages` and the head below `heads`, the part lies in the buffer.
        unsafe { self.start.add((page * self.heads + head) * self.part) }
    }
}
