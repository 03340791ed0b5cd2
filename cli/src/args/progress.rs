//! How far something is, on standard error. indicatif draws nothing where that is no terminal.

use std::collections::HashMap;
use std::time::Duration;

use gpt2_burn::Gpt2Config;
use gpt2_burn::checkpoint::DownloadProgress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Parameters of a model that takes long enough to load that somebody wonders.
const MANY: usize = 20_000_000;

/// A bar for each file that is downloaded.
pub fn downloads() -> impl FnMut(DownloadProgress) + Send + 'static {
    let all = MultiProgress::new();
    let style = style("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let mut bars: HashMap<String, ProgressBar> = HashMap::new();
    move |progress| {
        let bar = bars.entry(progress.file.clone()).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(progress.total)).with_style(style.clone());
            bar.with_message(progress.file.clone())
        });
        bar.set_length(progress.total);
        bar.set_position(progress.bytes);
    }
}

/// Says that a large model is being loaded, and for how long by now, until it is dropped. The library does not tell how far it is.
pub fn loading(config: &Gpt2Config) -> ProgressBar {
    let parameters = config.num_params();
    let spinner = ProgressBar::new_spinner().with_style(style("{spinner} loading {msg}: {elapsed}"));
    let spinner = spinner.with_message(format!("{:.0} M parameters", parameters as f64 / 1e6));
    // Without a tick it is never drawn.
    if parameters >= MANY && !spinner.is_hidden() {
        spinner.enable_steady_tick(Duration::from_millis(100));
    }
    spinner
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
