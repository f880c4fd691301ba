//! The layers of the sources. ARCHITECTURE.md lists the modules of `src` from top to bottom, and a module imports only
//! from modules below it. So there is no circle of modules either.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The names in code style in the first column of the table that has this header there.
fn listed(document: &str, header: &str) -> Vec<String> {
    let header = format!("| {header} |");
    let rows = document.lines().skip_while(|line| !line.starts_with(&header)).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let names: Vec<String> = rows.filter_map(|row| row.split('`').nth(1).map(str::to_owned)).collect();
    assert!(!names.is_empty(), "ARCHITECTURE.md has no table with the header `{header}`");
    names
}

fn architecture() -> String {
    fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap()
}

/// All source files, with their paths below `src`.
fn sources() -> BTreeMap<PathBuf, String> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, files),
                false if path.extension().is_some_and(|extension| extension == "rs") => files.push(path),
                false => {}
            }
        }
    }
    let (src, mut files) = (root().join("src"), Vec::new());
    walk(&src, &mut files);
    let relative = |path: &Path| path.strip_prefix(&src).unwrap().to_owned();
    files.iter().map(|path| (relative(path), fs::read_to_string(path).unwrap())).collect()
}

/// The modules that lead to a file, from the root of the crate: `kernel`, `cpu`, `span`.
fn module_path(file: &Path) -> Vec<String> {
    let mut path: Vec<String> = file.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs").into()).collect();
    path.pop_if(|last| *last == "mod");
    path
}

/// What a source file has beside comments and what is for tests only.
#[derive(Default)]
struct Scanned {
    /// Line and first name of each path that begins at the root of the crate.
    paths: Vec<(usize, String)>,
    /// Modules in files of their own that are for tests only.
    test_modules: Vec<String>,
}

/// Scans a file whose module is `depth` modules below the root of the crate. The file is formatted by rustfmt.
fn scan(text: &str, depth: usize) -> Scanned {
    let mut scanned = Scanned::default();
    // The indents of the modules with a body that a line is in.
    let mut bodies: Vec<&str> = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let code = line.split("//").next().unwrap_or_default().trim_end();
        let item = code.trim_start();
        let indent = &code[..code.len() - item.len()];
        if item == "#[cfg(test)]" {
            let mut rest = lines.by_ref().map(|(_, line)| line).skip_while(|line| line.trim_start().starts_with("#["));
            let item = rest.next().unwrap_or_default();
            scanned.test_modules.extend(module(item, ";").map(str::to_owned));
            if item.ends_with('{') {
                rest.find(|line| line.strip_prefix(indent).is_some_and(|line| line.starts_with('}')));
            }
            continue;
        }
        if module(item, " {").is_some() {
            bodies.push(indent);
        } else if item == "}" && bodies.last() == Some(&indent) {
            bodies.pop();
        }
        let names = from_root(code, depth + bodies.len());
        scanned.paths.extend(names.map(|name| (index + 1, name.to_owned())));
    }
    scanned
}

/// The name of the module that a line declares, if it ends like this.
fn module<'l>(line: &'l str, end: &str) -> Option<&'l str> {
    let (before, name) = line.strip_suffix(end)?.rsplit_once("mod ")?;
    let is_visibility = before.trim().is_empty() || before.trim_start().starts_with("pub");
    (is_visibility && !name.contains(' ')).then_some(name)
}

/// The first names of the paths in a line that begin at the root of the crate: by `crate::`, or by as many `super::` as
/// the module is below the root. It is empty for a list in braces.
fn from_root(code: &str, depth: usize) -> impl Iterator<Item = &str> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let supers = "super::".repeat(depth);
    let begins = code.match_indices("crate::").map(|(at, word)| (at, at + word.len()));
    let begins = begins.chain(code.match_indices(&supers).map(|(at, word)| (at, at + word.len())).collect::<Vec<_>>());
    begins.filter_map(move |(begin, end)| {
        let (before, after) = (&code[..begin], &code[end..]);
        let is_whole = !before.ends_with(|c| is_part(c) || c == ':' || c == '$') && !after.starts_with("super::");
        is_whole.then(|| &after[..after.find(|c| !is_part(c)).unwrap_or(after.len())])
    })
}

#[test]
fn a_module_imports_only_from_modules_below_it() {
    let modules = listed(&architecture(), "module");
    let place = |name: &str| modules.iter().position(|module| module == name);
    let sources = sources();
    let scanned: Vec<_> = sources.iter().map(|(file, text)| (file, scan(text, module_path(file).len()))).collect();
    let mut for_tests = BTreeSet::new();
    for (file, scanned) in &scanned {
        for module in &scanned.test_modules {
            for_tests.insert([module_path(file), vec![module.clone()]].concat());
        }
    }
    let is_for_tests = |path: &[String]| (1..=path.len()).any(|n| for_tests.contains(&path[..n]));
    let mut wrong = Vec::new();
    for (file, scanned) in scanned.iter().filter(|(file, _)| *file != Path::new("lib.rs")) {
        let path = module_path(file);
        if is_for_tests(&path) {
            continue;
        }
        let own = &path[0];
        let Some(own_place) = place(own) else { continue };
        for (line, name) in scanned.paths.iter().filter(|(_, name)| name != own) {
            let why = match place(name) {
                Some(other) if other > own_place => continue,
                Some(_) => format!("`{own}` imports from `{name}`, which ARCHITECTURE.md lists above it"),
                None => format!("`{own}` imports `{name}` from the root: name the module that it comes from"),
            };
            wrong.push(format!("src/{}:{line}: {why}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_tables_list_every_module_and_file() {
    let document = architecture();
    let sources = sources();
    let declared = sources[Path::new("lib.rs")].lines().filter_map(|line| module(line, ";"));
    let sorted = |names: Vec<String>| -> BTreeSet<String> { names.into_iter().collect() };
    assert_eq!(sorted(listed(&document, "module")), declared.map(str::to_owned).collect());
    for folder in ["adamax", "kernel", "kernel/cpu", "table"] {
        let entries = fs::read_dir(root().join("src").join(folder)).unwrap().map(|entry| entry.unwrap());
        let is_folder = |entry: &fs::DirEntry| entry.file_type().unwrap().is_dir();
        let name =
            |entry: &fs::DirEntry| entry.file_name().into_string().unwrap() + if is_folder(entry) { "/" } else { "" };
        let files: BTreeSet<String> = entries.map(|entry| name(&entry)).collect();
        assert_eq!(sorted(listed(&document, &format!("file of `src/{folder}`"))), files, "src/{folder}");
    }
}

/// A call reads on one screen, and a reader need not guess what `true` means.
#[test]
fn the_optimizer_has_short_files_and_no_flags_as_parameters() {
    for (file, text) in sources().iter().filter(|(file, _)| file.starts_with("adamax")) {
        let lines = text.lines().count();
        assert!(lines <= 300, "{} has {lines} lines", file.display());
        for (number, line) in text.lines().enumerate().filter(|(_, line)| line.contains("fn ")) {
            let parameters = line.split("->").next().unwrap();
            assert!(!parameters.contains(": bool"), "{}:{}: {line}", file.display(), number + 1);
        }
    }
}

#[test]
fn paths_from_the_root_are_found() {
    let text = "\
//! See crate::adamax.
use candle_core::Tensor;
use super::a::X; // a sibling of the module
use super::super::b::Y;
pub(crate) use crate::c::{Z, crate_::w};
use crate::{d, e};
#[cfg(test)]
use crate::f::{
    Q,
};
#[cfg(test)]
#[path = \"cases.rs\"]
mod cases;
mod inner {
    use super::super::super::g;
    use super::super::h;
}
fn run() -> crate::Result<()> {
    macros::crate::i!($crate::j, super::super::k)
}
#[cfg(test)]
mod tests {
    use crate::l;
}
use crate::m;
";
    let scanned = scan(text, 2);
    let found: Vec<(usize, &str)> = scanned.paths.iter().map(|(line, name)| (*line, name.as_str())).collect();
    assert_eq!(found, [(4, "b"), (5, "c"), (6, ""), (15, "g"), (18, "Result"), (19, "k"), (25, "m")]);
    assert_eq!(scanned.test_modules, ["cases"]);
}
