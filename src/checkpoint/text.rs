//! Text files of checkpoints.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Reads a text file; one that is not UTF-8 is an error of its own.
pub fn read_text(path: &Path) -> Result<String> {
    let path = PathBuf::from(path);
    let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    String::from_utf8(bytes).map_err(|error| Error::Checkpoint {
        path,
        reason: format!("not UTF-8: byte {} is invalid", error.utf8_error().valid_up_to()),
    })
}
