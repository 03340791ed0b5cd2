//! Keys and values in pages, `[P, H, L, D]` as they lie in memory, keys and values alike: new ones are written in place, and
//! attention reads them where they are.
//!
//! Whose the tokens are and where their pages are, the kernels read from [tensors](layout) and not from their launch: so a captured
//! step can be replayed with other pages.
//!
//! The order of sums is that of [`attend_pages`](crate::attend_pages): a workgroup computes what a [page](page) gives to some queries of a
//! head, and pages are folded from the left. So the bits of a query depend on its tokens, and not on its company, nor on the way
//! that was chosen. A full page that several rows share is read by each of them: a device's cache, which is as large as a layer's pages
//! or larger, has it as a rule, and to bring the rows together would cost a list of them a layer.

mod append;
mod attend;
mod copy;
mod fold;
mod layout;
mod page;
mod read;
#[cfg(test)]
mod tests;

pub use append::append;
pub use attend::{Plan, attend};
pub use copy::copy;
pub use layout::{PageTable, Queries, Tokens};
pub use read::read;

use burn_cubecl::tensor::CubeTensor;

/// Elements of a position of pages that can be read and written at once where they lie.
fn vector_size(pages: &CubeTensor) -> usize {
    let (shape, strides) = (pages.meta.shape(), pages.meta.strides());
    let (Some((width, _)), Some((last, others))) = (shape.split_last(), strides.split_last()) else { return 1 };
    let are_whole = width.is_multiple_of(4) && *last == 1 && others.iter().all(|stride| stride.is_multiple_of(4));
    if are_whole { 4 } else { 1 }
}
