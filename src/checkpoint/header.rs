//! The entries of a safetensors header, as the library has them, each name once.
//!
//! The library's `Metadata` takes the last of two entries of one name, does not name the entry that it cannot read, and
//! holds a copy of every value while it parses. It still checks what is read here.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::tensor::TensorInfo;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

/// The key of the texts in a header.
const TEXTS: &str = "__metadata__";

/// Contents of a header.
#[derive(Default)]
pub(super) struct Header {
    /// The text that was looked for.
    pub(super) text: Option<String>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Parses a header, of whose texts only that of the key `text` is kept.
    pub(super) fn parse(json: &[u8], text: Option<&str>) -> serde_json::Result<Self> {
        let (mut header, mut json) = (Self::default(), serde_json::Deserializer::from_slice(json));
        Entries { header: &mut header, text, are_texts: false }.deserialize(&mut json)?;
        json.end()?;
        Ok(header)
    }
}

/// Puts the entries of an object into a header.
struct Entries<'h> {
    header: &'h mut Header,
    text: Option<&'h str>,
    /// Whether the object is the one that has the texts.
    are_texts: bool,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.are_texts { "texts by their keys" } else { "a header of tensors" })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { header, text, are_texts } = self;
        let mut has_texts = false;
        while let Some(name) = map.next_key::<String>()? {
            let is_twice = if are_texts && text != Some(&name) {
                map.next_value::<IgnoredAny>()?;
                false
            } else if are_texts {
                header.text.replace(map.next_value()?).is_some()
            } else if name == TEXTS {
                map.next_value_seed(Entries { header: &mut *header, text, are_texts: true })?;
                std::mem::replace(&mut has_texts, true)
            } else {
                let info = map.next_value();
                let info = info.map_err(|error| A::Error::custom(format!("the tensor `{name}`: {error}")))?;
                header.tensors.insert(name.clone(), info).is_some()
            };
            if is_twice {
                return Err(A::Error::custom(format!("`{name}` is there twice")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_twice_is_named() {
        let tensor = r#""w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
        let (text, other) = (r#""key":"""#, r#""other":"""#);
        let texts = |texts: &str| format!(r#""__metadata__":{{{texts}}}"#);
        let parse = |entries: &[&str]| Header::parse(format!("{{{}}}", entries.join(",")).as_bytes(), Some("key"));
        let header = parse(&[tensor, &texts(&[text, other].join(","))]).unwrap();
        assert_eq!((header.tensors.len(), header.text.as_deref()), (1, Some("")));
        for (name, entries) in [
            ("`w`", [tensor, tensor]),
            ("`key`", [tensor, &texts(&[text, text].join(","))]),
            ("`__metadata__`", [&texts(text), &texts(other)]),
        ] {
            let error = parse(&entries).err().unwrap().to_string();
            assert!(error.contains(&format!("{name} is there twice")), "{error}");
        }
    }
}
