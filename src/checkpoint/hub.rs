//! Models by name: a path, a published size, or an id on the Hugging Face hub.

use std::env;
use std::path::{Path, PathBuf};

use super::Checkpoint;
use crate::{Error, Gpt2Config, Result};

/// How far a download is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownloadProgress {
    /// The file that is being fetched.
    pub file: String,
    /// Bytes of it that have arrived.
    pub bytes: u64,
    /// Bytes that it has.
    pub total: u64,
}

impl Checkpoint {
    /// Opens a checkpoint by name: an existing path; else a published size (`gpt2`, `gpt2-medium`, `gpt2-large`,
    /// `gpt2-xl`) or any id on the Hugging Face hub (`owner/name`).
    ///
    /// A model that is in the hub's local cache (`HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`, which
    /// `transformers` and `huggingface-cli` fill) is opened from there, without network. Others are downloaded into
    /// that cache if the feature `hub` is on, and `progress` hears of it.
    ///
    /// # Errors
    ///
    /// [`Error::ModelNotFound`] if nothing of this name can be had; otherwise as [`open`](Self::open).
    pub fn find(name: &str, progress: impl FnMut(DownloadProgress) + Send + 'static) -> Result<Self> {
        if Path::new(name).exists() {
            return Self::open(name);
        }
        let id = HubId::parse(name)?;
        let mut error = None;
        for snapshot in cache_folder().map(|cache| id.cached(&cache)).unwrap_or_default() {
            match Self::open(snapshot) {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(other) => error = error.or(Some(other)),
            }
        }
        // A snapshot that lacks files is as good as none if they can be had; any other trouble with it is reported.
        match error {
            Some(error) if !cfg!(feature = "hub") || !matches!(error, Error::Checkpoint { .. }) => return Err(error),
            _ => {}
        }
        id.download(name, progress)
    }
}

/// `owner/name` on the hub, or the `name` alone of a model that is older than owners.
struct HubId {
    owner: Option<String>,
    name: String,
}

impl HubId {
    /// The id that a name stands for.
    fn parse(name: &str) -> Result<Self> {
        let is_part = |part: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !part.is_empty() && part.bytes().all(allowed) && !part.starts_with('.') && !part.contains("..")
        };
        let (owner, model) = match name.split_once('/') {
            Some((owner, model)) => (Some(owner), model),
            None if Gpt2Config::published(name).is_some() => (Some("openai-community"), name),
            None => (None, name),
        };
        if !owner.is_none_or(is_part) || !is_part(model) {
            return Err(Error::ModelNotFound {
                name: name.to_owned(),
                reason: "there is no such path, and it cannot be an id on the hub (owner/name)".to_owned(),
            });
        }
        Ok(Self { owner: owner.map(str::to_owned), name: model.to_owned() })
    }

    /// The folders of this model's newest snapshots in the cache: by its id, and for OpenAI's by the name alone, which
    /// is where they went before they had an owner. Nobody else's `gpt2` is that one.
    fn cached(&self, cache: &Path) -> Vec<PathBuf> {
        let name = &self.name;
        let with_owner = self.owner.as_ref().map(|owner| format!("models--{owner}--{name}"));
        let is_alone = self.owner.as_deref().is_none_or(|owner| owner == "openai-community");
        let alone = is_alone.then(|| format!("models--{name}"));
        let snapshot = |folder: String| {
            let repository = cache.join(folder);
            let commit = std::fs::read_to_string(repository.join("refs").join("main")).ok()?;
            let snapshot = repository.join("snapshots").join(commit.trim());
            snapshot.join("config.json").is_file().then_some(snapshot)
        };
        [with_owner, alone].into_iter().flatten().filter_map(snapshot).collect()
    }

    #[cfg(not(feature = "hub"))]
    fn download(&self, name: &str, _progress: impl FnMut(DownloadProgress) + Send + 'static) -> Result<Checkpoint> {
        let id = self.owner.as_ref().map_or(self.name.clone(), |owner| format!("{owner}/{}", self.name));
        Err(Error::ModelNotFound {
            name: name.to_owned(),
            reason: format!(
                "there is no such path, and {id} is not in the hub's local cache; build with `--features hub` to \
                 download it, or fetch it with `huggingface-cli download {id}`"
            ),
        })
    }
}

#[cfg(feature = "hub")]
mod download {
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex, PoisonError};

    use hf_hub::progress::{DownloadEvent, Progress, ProgressEvent, ProgressHandler};
    use hf_hub::repository::RepoTypeModel;
    use hf_hub::{HFClientSync, HFError, HFRepositorySync};

    use super::super::shards::Index;
    use super::{DownloadProgress, HubId};
    use crate::{Checkpoint, Error, Result};

    /// Hands the hub client's events on to the caller's closure.
    struct Handler<F>(Mutex<F>);

    impl<F: FnMut(DownloadProgress) + Send> ProgressHandler for Handler<F> {
        fn on_progress(&self, event: &ProgressEvent) {
            let mut tell = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                    for file in files {
                        tell(DownloadProgress {
                            file: file.filename.clone(),
                            bytes: file.bytes_completed,
                            total: file.total_bytes,
                        });
                    }
                }
                ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, total_bytes, .. }) => {
                    tell(DownloadProgress { file: String::new(), bytes: *bytes_completed, total: *total_bytes });
                }
                _ => {}
            }
        }
    }

    impl HubId {
        /// Downloads what [`Checkpoint::open`] needs, and opens it.
        pub(super) fn download(
            &self,
            name: &str,
            progress: impl FnMut(DownloadProgress) + Send + 'static,
        ) -> Result<Checkpoint> {
            let failed = |error: HFError| Error::ModelNotFound { name: name.to_owned(), reason: error.to_string() };
            let owner = self.owner.as_deref().unwrap_or("");
            let repository = HFClientSync::new().map_err(failed)?.model(owner, &self.name);
            let fetch = Fetch { repository, progress: Progress::from(Arc::new(Handler(Mutex::new(progress)))) };

            let config = fetch.file("config.json").map_err(failed)?.ok_or_else(|| Error::ModelNotFound {
                name: name.to_owned(),
                reason: "the repository has no config.json".to_owned(),
            })?;
            let folder = config.parent().unwrap_or(Path::new("")).to_owned();
            // Before the weights: an interrupted download must not look complete and lack its tokenizer.
            if fetch.file("tokenizer.json").map_err(failed)?.is_none() {
                fetch.file("vocab.json").map_err(failed)?;
                fetch.file("merges.txt").map_err(failed)?;
            }
            if let Some(index) = fetch.weights().map_err(failed)? {
                for shard in Index::read(&index)?.files() {
                    fetch.file(shard).map_err(failed)?;
                }
            }
            Checkpoint::open(folder)
        }
    }

    struct Fetch {
        repository: HFRepositorySync<RepoTypeModel>,
        progress: Progress,
    }

    impl Fetch {
        /// The local path of a file; none if the repository does not have it.
        fn file(&self, name: &str) -> Result<Option<PathBuf>, HFError> {
            let sent = self.repository.download_file().filename(name).progress(self.progress.clone()).send();
            match sent {
                Ok(path) => Ok(Some(path)),
                Err(HFError::EntryNotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        }

        /// Fetches the first form of the weights that there is, in the order in which they are opened; what is missing
        /// is said when the folder is opened. Returns the index if the weights are in shards.
        fn weights(&self) -> Result<Option<PathBuf>, HFError> {
            for (whole, index) in [
                ("model.safetensors", "model.safetensors.index.json"),
                ("pytorch_model.bin", "pytorch_model.bin.index.json"),
            ] {
                if self.file(whole)?.is_some() {
                    return Ok(None);
                }
                let index = self.file(index)?;
                if index.is_some() {
                    return Ok(index);
                }
            }
            Ok(None)
        }
    }
}

/// The hub's local cache, where its own tools look for it.
fn cache_folder() -> Option<PathBuf> {
    let folder = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || Some(folder("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")))?.join("huggingface"));
    folder("HF_HUB_CACHE")
        .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(folder("HF_HOME").or_else(home)?.join("hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_for_ids() {
        let id = |name: &str| HubId::parse(name).map(|id| (id.owner, id.name)).ok();
        let with = |owner: &str, name: &str| Some((Some(owner.to_owned()), name.to_owned()));
        assert_eq!(id("gpt2-xl"), with("openai-community", "gpt2-xl"));
        assert_eq!(id("distilbert/distilgpt2"), with("distilbert", "distilgpt2"));
        assert_eq!(id("distilgpt2"), Some((None, "distilgpt2".to_owned())));
        for name in ["", "a/b/c", "../x", "a/..", "a/", "/b", "a/b c", ".a/b", ".."] {
            assert_eq!(id(name), None, "{name}");
        }
    }

    #[test]
    fn the_cache_is_looked_up_as_the_hub_tools_lay_it_out() {
        let cache = tempfile::tempdir().unwrap();
        let id = HubId::parse("gpt2").unwrap();
        assert!(id.cached(cache.path()).is_empty());
        let mut expected = Vec::new();
        for folder in ["models--gpt2", "models--openai-community--gpt2"] {
            let repository = cache.path().join(folder);
            let snapshot = repository.join("snapshots").join("abc123");
            std::fs::create_dir_all(repository.join("refs")).unwrap();
            std::fs::create_dir_all(&snapshot).unwrap();
            std::fs::write(repository.join("refs").join("main"), "abc123\n").unwrap();
            std::fs::write(snapshot.join("config.json"), "{}").unwrap();
            expected.insert(0, snapshot);
            assert_eq!(id.cached(cache.path()), expected);
        }
        assert!(HubId::parse("somebody/gpt2").unwrap().cached(cache.path()).is_empty());
    }
}
