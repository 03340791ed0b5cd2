//! One word for one thing: docs/words.txt lists those that were replaced.

use std::io::Read;
use std::path::{Path, PathBuf};

fn texts(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let is_text = [".rs", ".md", ".py", ".toml"].iter().any(|end| name.ends_with(end)) || is_script(&path);
        match path.is_dir() {
            true if name == ".ci" || !["target", "runs", "out"].contains(&name.as_str()) && !name.starts_with('.') => {
                texts(&path, found)
            }
            false if is_text => found.push(path),
            _ => {}
        }
    }
}

/// Whether a file begins as scripts do.
fn is_script(path: &Path) -> bool {
    let mut begins = [0; 2];
    let file = std::fs::File::open(path);
    path.is_file() && file.and_then(|mut file| file.read_exact(&mut begins)).is_ok() && begins == *b"#!"
}

/// A text whose lines, without what makes them comments, are one: a phrase may be broken over two.
fn unbroken(text: &str) -> String {
    text.lines().map(|line| line.trim().trim_start_matches(['/', '!', '#', '*']).trim()).collect::<Vec<_>>().join(" ")
}

/// Whether `text` has `words`, and not as a part of longer words.
fn has(text: &str, words: &str) -> bool {
    let is_word = |letter: Option<char>| letter.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    let is_whole = |(at, _): &(usize, &str)| {
        !is_word(text[..*at].chars().next_back()) && !is_word(text[at + words.len()..].chars().next())
    };
    text.match_indices(words).any(|found| is_whole(&found))
}

#[test]
fn words_that_were_replaced_do_not_come_back() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = std::fs::read_to_string(root.join("docs/words.txt")).unwrap();
    let (mut replaced, mut now) = (Vec::new(), "");
    for line in list.lines().filter(|line| !line.is_empty()) {
        match (line.strip_prefix("# now: "), line.starts_with('#')) {
            (Some(name), _) => now = name,
            (None, true) => {}
            (None, false) => replaced.push((line, now)),
        }
    }
    assert!(replaced.len() > 40, "{} words", replaced.len());
    let mut files = Vec::new();
    texts(root, &mut files);
    assert!(files.len() > 200, "{} files", files.len());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let joined = unbroken(&text);
        for (old, new) in &replaced {
            assert!(!has(&text, old) && !has(&joined, old), "{}: `{old}` is called `{new}`", file.display());
        }
    }
}

#[test]
fn only_whole_words_are_found() {
    assert!(has("a page.", "page") && has("page", "page") && has("x of a page y", "of a page"));
    assert!(has(&unbroken("// one\n    /// page"), "one page"));
    assert!(!has("pages", "page") && !has("is_page", "page") && !has("roof a page", "of a page"));
}
