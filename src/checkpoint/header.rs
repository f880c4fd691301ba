//! The header of a safetensors file: JSON, of which is kept what was looked for, and nothing else takes memory.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::reading::HeaderLimits;

/// The most dimensions that a tensor may have.
const DIMENSIONS: usize = 64;
/// The number of names of tensors that are kept though they were not looked for, to say so.
const SURPLUS: usize = 5;
/// The key of the texts in a header.
const TEXTS: &str = "__metadata__";

/// What is looked for in a file.
pub(super) struct Wanted<'w> {
    /// The key of its text.
    pub(super) text: Option<&'static str>,
    /// Whether a tensor of this name may be there.
    pub(super) is_tensor: &'w dyn Fn(&str) -> bool,
    /// How much the text may hold; if it is not known, as much as those of the variables in the file need.
    pub(super) limits: Option<HeaderLimits>,
}

/// What of a header is kept.
#[derive(Default)]
pub(super) struct Header {
    /// The text that was looked for.
    pub(super) text: Option<String>,
    /// The tensors that were looked for.
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    /// The first few tensors that were not.
    pub(super) surplus: Vec<String>,
}

impl Header {
    pub(super) fn parse(json: &[u8], wanted: &Wanted<'_>) -> serde_json::Result<Self> {
        let mut json = serde_json::Deserializer::from_slice(json);
        let header = wanted.deserialize(&mut json)?;
        json.end()?;
        Ok(header)
    }
}

/// One tensor's entry.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    #[serde(deserialize_with = "shape")]
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// What a key stands for.
enum Kind {
    Texts,
    Tensor(String),
    Surplus(String),
}

impl<'de> DeserializeSeed<'de> for &Wanted<'_> {
    type Value = Header;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &Wanted<'_> {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a header of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let (mut header, mut has_texts) = (Header::default(), false);
        let kind = |key: &str| match key {
            TEXTS => Kind::Texts,
            name if (self.is_tensor)(name) => Kind::Tensor(name.to_owned()),
            name => Kind::Surplus(name.to_owned()),
        };
        while let Some(kind) = map.next_key_seed(Key(kind))? {
            match kind {
                Kind::Texts => {
                    if std::mem::replace(&mut has_texts, true) {
                        return Err(A::Error::custom(format_args!("`{TEXTS}` is there twice")));
                    }
                    header.text = map.next_value_seed(Texts { wanted: self.text })?;
                }
                Kind::Tensor(name) => {
                    let entry = map.next_value();
                    // A dtype that nobody knows has no name otherwise.
                    let named = |error| A::Error::custom(format_args!("the tensor `{name}`: {error}"));
                    let Entry { dtype, shape, data_offsets } = entry.map_err(named)?;
                    if header.tensors.contains_key(&name) {
                        return Err(A::Error::custom(format_args!("the tensor `{name}` is there twice")));
                    }
                    header.tensors.insert(name, TensorInfo { dtype, shape, data_offsets });
                }
                Kind::Surplus(name) => {
                    map.next_value::<IgnoredAny>()?;
                    if header.surplus.len() < SURPLUS {
                        header.surplus.push(name);
                    }
                }
            }
        }
        Ok(header)
    }
}

/// A key that is looked at before anything is kept of it.
struct Key<F>(F);

impl<'de, T, F: FnOnce(&str) -> T> DeserializeSeed<'de> for Key<F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<T, F: FnOnce(&str) -> T> Visitor<'_> for Key<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, key: &str) -> Result<T, E> {
        Ok((self.0)(key))
    }
}

/// The texts of a header, of which one is looked for.
struct Texts {
    wanted: Option<&'static str>,
}

impl<'de> DeserializeSeed<'de> for Texts {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Texts {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("texts by their keys")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(is_wanted) = map.next_key_seed(Key(|key: &str| self.wanted == Some(key)))? {
            if !is_wanted {
                map.next_value::<IgnoredAny>()?;
            } else if found.replace(map.next_value()?).is_some() {
                return Err(A::Error::custom("a text is there twice"));
            }
        }
        Ok(found)
    }
}

/// Dimensions, no more than a tensor may have.
fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct Shape;
    impl<'de> Visitor<'de> for Shape {
        type Value = Vec<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {DIMENSIONS} dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut shape = Vec::new();
            while let Some(dim) = seq.next_element()? {
                if shape.len() == DIMENSIONS {
                    return Err(A::Error::invalid_length(DIMENSIONS + 1, &self));
                }
                shape.push(dim);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Shape)
}
