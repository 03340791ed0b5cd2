//! Behaviour of the whole crate; what concerns one file is tested beside it.

mod cost;
mod pages;
mod prefix_plan;
mod prefix_tree;
