//! **Patterns of names**, as in `no_decay`: whole components of a name with dots, and `*` for a part of one. Pure.

use std::iter;

/// Whether components of `name` that follow each other match those of `pattern`, each a whole one. In a component of the
/// pattern `*` is any run of characters, also none.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    iter::successors(Some(name), |name| Some(name.split_once('.')?.1)).any(|from_here| {
        let mut components = from_here.split('.');
        pattern.split('.').all(|pattern| components.next().is_some_and(|component| is_like(pattern, component)))
    })
}

fn is_like(pattern: &str, component: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == component };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    let Some(mut left) = component.strip_prefix(start).and_then(|rest| rest.strip_suffix(end)) else { return false };
    // The first place of a piece leaves the most to those behind it, so no other one has to be tried.
    middle.split('*').all(|piece| match left.split_once(piece) {
        Some((_, behind)) => {
            left = behind;
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, matching: &[&str], others: &[&str]) {
        let matched = |names: &[&str]| names.iter().map(|name| matches(pattern, name)).collect::<Vec<_>>();
        assert_eq!(matched(matching), vec![true; matching.len()], "{pattern}: {matching:?}");
        assert_eq!(matched(others), vec![false; others.len()], "{pattern}: {others:?}");
    }

    #[test]
    fn components_match_as_a_whole() {
        check("bias", &["bias", "encoder.0.bias", "bias.0"], &["biases", "q_bias", "encoder.0.q_bias.weight", ""]);
        check("norm", &["norm.weight", "layers.1.norm.bias"], &["normal_head.weight", "layer_norm.weight", "Norm"]);
        check("1", &["layers.1.weight"], &["layers.11.weight", "fc1.weight"]);
    }

    #[test]
    fn several_components_are_neighbors() {
        check(
            "layer_norm.weight",
            &["layer_norm.weight", "a.layer_norm.weight", "layer_norm.weight.b"],
            &["layer_norm.bias", "layer_norm.0.weight", "my_layer_norm.weight", "layer_norm", "weight"],
        );
        // The second of two that begin alike.
        check("a.b", &["a.a.b", "a.c.a.b.c"], &["a.c.b", "b.a"]);
    }

    #[test]
    fn a_star_is_any_part_of_a_component() {
        let norms = ["LayerNorm.weight", "h.0.ln_1.bias", "layers.0.input_layernorm.weight", "model.norm.weight"];
        check("*norm*", &norms[2..], &norms[..2]);
        check("ln_*", &["h.0.ln_1.bias", "ln_f.weight", "ln_"], &["h.0.kiln_1", "ln.f"]);
        check("*_norm", &["q_norm.weight", "_norm"], &["q_norms", "norm"]);
        check("layers.*.bias", &["layers.0.bias", "layers..bias"], &["layers.bias", "layers.0.fc.bias"]);
        check("*", &["", "a", "a.b"], &[]);
        check("**", &["", "a"], &[]);
    }

    #[test]
    fn what_several_stars_are_is_found() {
        check("a*b*c", &["abc", "aXbYc", "abbc", "abcbc", "x.a1b2c.y"], &["ac", "acb", "abcd", "a.b.c"]);
        check("a*a", &["aa", "aba"], &["a", "ab"]);
        check("*ab*ab*", &["abab", "xababx", "aabxab"], &["ab", "aba"]);
        check("ö*", &["ö", "öffnen.bias"], &["o", "größe"]);
        // Another way than this would look at all of the ways to share it out.
        check(&"*a".repeat(1000), &["a".repeat(1000).as_str()], &["a".repeat(999).as_str(), "b"]);
    }
}
