//! Names that a checkpoint and an optimizer do not share, and the reason that they may have.

use crate::error::{Error, Result, listed};

/// The number of parts of a name that are tried as a prefix that the other side does not have.
const PARTS: usize = 8;

/// The origin of names, for errors.
#[derive(Clone, Copy)]
pub(crate) enum Source {
    File,
    Snapshot,
}

/// Makes sure that the variables `own`, which are in alphabetical order, are those of a checkpoint.
pub(crate) fn check(own: &[&str], theirs: &[&str], source: Source) -> Result<()> {
    let (surplus, missing) = differences(own, theirs);
    let (name, expected, got) = match (surplus, missing) {
        (Some(name), _) => (name, "no such var", "a surplus one"),
        (None, Some(name)) => (name, "the state of this var", "none"),
        (None, None) => return Ok(()),
    };
    let (source, function) = match source {
        Source::File => ("file", "load_matching"),
        Source::Snapshot => ("snapshot", "restore_matching"),
    };
    let hint = hint(own, theirs, source);
    Err(Error::checkpoint(name, expected, format!("{got}{hint}; `{function}` takes the vars that are in both")))
}

/// The first name that is only there, and the first that is only here.
pub(crate) fn differences<'n>(own: &[&'n str], theirs: &[&'n str]) -> (Option<&'n str>, Option<&'n str>) {
    let mut sorted = theirs.to_vec();
    sorted.sort_unstable();
    let surplus = sorted.iter().find(|name| own.binary_search(name).is_err());
    let missing = own.iter().find(|name| sorted.binary_search(name).is_err());
    (surplus.copied(), missing.copied())
}

/// The names of both sides, and the prefix that only one of them has, to stand behind "got one".
pub(crate) fn hint(own: &[&str], theirs: &[&str], source: &str) -> String {
    let of_source = format!("in the {source}");
    let mut text = format!("; the names {of_source} are {}", listed(theirs.iter().copied()));
    text += &format!(", those of this optimizer are {}", listed(own.iter().copied()));
    for (names, others, whose, of_others) in
        [(theirs, own, of_source.as_str(), "of this optimizer"), (own, theirs, "of this optimizer", &of_source)]
    {
        if let Some(prefix) = prefix(names, others) {
            text += &format!("; every name {whose} begins with `{prefix}`, which those {of_others} do not have");
        }
    }
    text
}

/// The beginning of all `names`, up to a dot or a slash, without which most of them are names of `others`.
fn prefix<'n>(names: &[&'n str], others: &[&str]) -> Option<&'n str> {
    let first = names.first()?;
    let mut sorted = others.to_vec();
    sorted.sort_unstable();
    let ends = first.match_indices(['.', '/']).map(|(at, _)| &first[..=at]).take(PARTS);
    let counts = ends.map_while(|prefix| {
        let stripped: Option<Vec<_>> = names.iter().map(|name| name.strip_prefix(prefix)).collect();
        Some((prefix, stripped?.iter().filter(|name| sorted.binary_search(name).is_ok()).count()))
    });
    counts.filter(|(_, count)| *count > 0).max_by_key(|(_, count)| *count).map(|(prefix, _)| prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_of_either_side_is_found() {
        let plain = ["fc1.bias", "fc1.weight", "fc2.weight"];
        for prefix_of in ["module.", "_orig_mod.", "module._orig_mod.", "model/"] {
            let prefixed = plain.map(|name| format!("{prefix_of}{name}"));
            let prefixed = prefixed.each_ref().map(String::as_str);
            assert_eq!(prefix(&prefixed, &plain), Some(prefix_of));
            assert_eq!(prefix(&plain, &prefixed), None);
            let both = [hint(&plain, &prefixed, "file"), hint(&prefixed, &plain, "file")];
            assert!(both[0].contains(&format!("every name in the file begins with `{prefix_of}`")), "{}", both[0]);
            assert!(
                both[1].contains(&format!("every name of this optimizer begins with `{prefix_of}`")),
                "{}",
                both[1]
            );
        }
        // Another model, of which all layers are in one.
        assert_eq!(prefix(&["head.a", "head.b"], &plain), None);
        assert_eq!(prefix(&[], &plain), None);
    }
}
