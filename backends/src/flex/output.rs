//! A matrix that several threads write.
#![allow(unsafe_code)] // each thread writes other elements of one matrix, which slices cannot express

use std::marker::PhantomData;

/// A row-major matrix of which threads write disjoint ranges of rows.
#[derive(Clone, Copy)]
pub struct Output<'a> {
    start: *mut f32,
    len: usize,
    width: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, which may be sent; and writing from several threads is what `row_part`'s
// callers promise to do in disjoint ranges.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// `values` in rows of `width`.
    pub fn new(values: &'a mut [f32], width: usize) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), width, borrow: PhantomData }
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Elements `column..column + count` of a row.
    ///
    /// # Panics
    ///
    /// If they are not in the matrix.
    ///
    /// # Safety
    ///
    /// While the slice is in use, no other may be asked for that has an element of it.
    #[allow(clippy::mut_from_ref)] // as the section on safety says
    pub unsafe fn row_part(&self, row: usize, column: usize, count: usize) -> &'a mut [f32] {
        let start = row * self.width + column;
        assert!(column + count <= self.width && start + count <= self.len, "outside of the matrix");
        // SAFETY: the elements are in the borrowed slice, as just checked; nobody else has them, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), count) }
    }
}
