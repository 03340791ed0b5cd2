//! ARCHITECTURE.md names every file, and no other.

use std::collections::BTreeSet;
use std::path::Path;

fn sources(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|extension| extension == "rs") => {
                let path = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
                found.insert(path.to_str().unwrap().replace('\\', "/"));
            }
            false => {}
        }
    }
}

/// Lines that are neither empty nor comments, before a file's tests.
fn lines_of_code(file: &str) -> usize {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().lines();
    code.filter(|line| !line.trim().is_empty() && !line.trim().starts_with("//")).count()
}

#[test]
fn every_file_has_its_line_and_a_long_one_its_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    for folder in ["src", "core/src", "backends/src", "cli/src"] {
        sources(&root.join(folder), &mut found);
    }
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let lines: Vec<(&str, &str)> =
        text.lines().filter_map(|line| line.strip_prefix("- `")?.split_once("`: ")).collect();
    let named: BTreeSet<String> = lines.iter().map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(named, found);
    for (file, line) in lines {
        assert_eq!(line.contains("lines of code: "), lines_of_code(file) > 300, "{file}");
    }
}
