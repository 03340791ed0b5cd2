//! What requests of all sizes take, in a binary of its own: it counts what is allocated, and writes all of it to do so, also what
//! the system would give only when it is used.

#[allow(dead_code, unused_imports, reason = "the other binary uses the rest")]
#[path = "../it/common/mod.rs"]
mod common;
mod limits;

#[global_allocator]
static ALLOCATED: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;
