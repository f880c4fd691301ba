//! Maps whose keys are ids of tensors or addresses: many of them are asked for in a step, and none comes from a stranger,
//! so that a fast hash with one seed serves them. Nothing depends on the order of their entries.

use std::collections::HashMap;

use foldhash::fast::FixedState;

/// A map by ids or addresses.
pub(crate) type IdMap<K, V> = HashMap<K, V, FixedState>;
