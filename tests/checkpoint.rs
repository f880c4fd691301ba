//! Checkpoints: a run that was interrupted has the bits of one that was not, a file that does not fit is refused and
//! changes nothing, and a file is complete or not there, whenever the process is killed.

#[path = "checkpoint_support/files.rs"]
mod files;
#[path = "checkpoint_support/kill.rs"]
mod kill;
#[path = "checkpoint_support/matching.rs"]
mod matching;
#[path = "checkpoint_support/memory.rs"]
mod memory;
#[cfg(unix)]
#[path = "checkpoint_support/modes.rs"]
mod modes;
#[path = "checkpoint_support/resume.rs"]
mod resume;
#[path = "checkpoint_support/strict.rs"]
mod strict;
#[path = "checkpoint_support/support.rs"]
mod support;
