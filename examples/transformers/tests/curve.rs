//! The loss curve of a small BERT encoder is that of PyTorch.

use std::process::Command;

/// `benches/peers/minilm.py` has recorded the losses; the program fails where one differs by 5e-5 or more.
#[test]
fn the_losses_are_those_of_pytorch() {
    let recording = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recorded/small_bert.json");
    let output = Command::new(env!("CARGO_BIN_EXE_minilm")).args(["--compare", recording]).output();
    let output = output.expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("largest difference of 100 losses"), "{text}");
}
