//! Adapters in PEFT's files, and merged models.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::config::{LoraConfig, Modules};
use crate::error::{Error, Result};
use crate::lora::Lora;
use crate::rules::Rules;
use crate::state::{Stored, Waiting, names};

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
/// The prefix of every name in PEFT's file.
const PREFIX: &str = "base_model.model.";
/// The suffix of the module that PEFT puts in an adapted module's place.
const BASE_LAYER: &str = ".base_layer";
/// The metadata without which `transformers` reads no model.
const FORMAT: (&str, &str) = ("format", "pt");
/// Keys of the file's metadata, which PEFT does not read.
const SEED: &str = "candle_adapters.seed";
const DRAW: &str = "candle_adapters.draw";

impl Lora {
    /// Reads an adapter from a folder, as PEFT and [`save`](Self::save) write it: `adapter_config.json` and
    /// `adapter_model.safetensors`. It is in evaluation mode; [`train`](Self::train) turns the dropout on.
    ///
    /// Matrices in f16 and bf16 become f32, as in PEFT. The seed and the number of the dropout's masks are those of the
    /// run that saved it, or 0 for PEFT's files.
    ///
    /// # Errors
    ///
    /// Files that cannot be read; settings as in [`LoraConfig::from_json`]; all names that are not those of a LoRA
    /// adapter, that lack their other half, or that have another rank than the settings say.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let config = LoraConfig::from_json(&text).map_err(Error::content(&path))?;
        let rules = Rules::new(&config)?;
        let path = folder.join(WEIGHTS);
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| Error::format(&path, error))?;
        let number = |key: &str| match metadata.metadata().as_ref().and_then(|entries| entries.get(key)) {
            None => Ok(0),
            Some(text) => {
                text.parse().map_err(|_| Error::format(&path, format!("{key}: expected a number, got {text:?}")))
            }
        };
        let (seed, draw) = (number(SEED)?, number(DRAW)?);
        let tensors =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|error| Error::format(&path, error))?;
        if tensors.is_empty() {
            return Err(Error::format(&path, "expected the tensors of an adapter, got none"));
        }
        let waiting = sort(&rules, tensors).map_err(Error::content(&path))?;
        Ok(Self::stored(config, rules, seed, draw, waiting))
    }

    /// Writes the adapter into a folder, which is made if it is not there, as PEFT writes it: `adapter_config.json` and
    /// `adapter_model.safetensors`. `PeftModel.from_pretrained` reads it. The metadata has the seed and the number of
    /// the dropout's masks besides, so that a run goes on with the same bits.
    ///
    /// Each file is written under another name, synced, and renamed. The target `all-linear` is written as the names
    /// of the modules that have adapters, as PEFT does it.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify); files that cannot be written. The old ones are then still there, unless the last
    /// renaming of the two fails.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let inner = &self.inner;
        self.verify()?;
        let state = inner.state();
        let mut tensors = BTreeMap::new();
        for (module, pair) in &state.pairs {
            let [a, b] = names(module, pair.is_embedding).map(|name| format!("{PREFIX}{name}"));
            tensors.insert(a, pair.a.as_detached_tensor());
            tensors.insert(b, pair.b.as_detached_tensor());
        }
        for (name, whole) in &state.whole {
            let name = match name.rsplit_once('.') {
                Some((module, last)) if state.pairs.contains_key(module) => {
                    format!("{PREFIX}{module}{BASE_LAYER}.{last}")
                }
                _ => format!("{PREFIX}{name}"),
            };
            tensors.insert(name, whole.tensor().detach());
        }
        let mut config = inner.config.clone();
        if matches!(&config.target_modules, Modules::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear")) {
            config.target_modules = Modules::Names(state.pairs.keys().cloned().collect());
        }
        // A run that goes on from here builds its model: what the next refresh of this one would do.
        let draw = if inner.stale(&state)?.is_some() { inner.next_draw(&state) } else { state.draw };
        drop(state);
        let (seed, draw) = (inner.seed.to_string(), draw.to_string());
        let metadata = [FORMAT, (SEED, &seed), (DRAW, &draw)];
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let (weights, settings) = (Beside::new(&folder.join(WEIGHTS))?, Beside::new(&folder.join(CONFIG))?);
        weights.write_tensors(&tensors, &metadata)?;
        settings.write(|file| file.write_all(config.to_json().as_bytes()))?;
        weights.commit()?;
        settings.commit()
    }

    /// The base model's tensors with the adapters merged: each adapted weight becomes `base + scale * B A`, rounded
    /// once to its type, and `modules_to_save` take their places or are added. No model has to be built before where
    /// the adapters come from a file. The dropout has no part in it.
    ///
    /// # Errors
    ///
    /// No adapters; all names and shapes of the adapters that `tensors` does not have; errors of candle.
    pub fn merge(&self, tensors: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
        let inner = &self.inner;
        let mut state = inner.state();
        if state.waiting.pairs.is_empty() {
            inner.verify(&mut state)?;
        }
        let mut merged: HashMap<_, _> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect();
        let whole = state.whole.iter().map(|(name, whole)| (name, whole.tensor()));
        for (name, tensor) in whole.chain(&state.waiting.whole) {
            let tensor = match tensors.get(name) {
                Some(base) => tensor.to_dtype(base.dtype())?.to_device(base.device())?,
                None => tensor.clone(),
            };
            merged.insert(name.clone(), tensor.detach());
        }
        let (mut missing, mut mismatched) = (Vec::new(), Vec::new());
        for module in state.pairs.keys().chain(state.waiting.pairs.keys()) {
            let name = format!("{module}.weight");
            let Some(base) = merged.get(&name) else {
                missing.push(name);
                continue;
            };
            let Some((factors, is_embedding)) = inner.any_factors(&state, module, base.device())? else { continue };
            let misfits = match base.rank() {
                2 => inner.mismatched(module, base, &factors.a, &factors.b, is_embedding)?,
                _ => vec![format!("{name} {:?} for two dimensions", base.dims())],
            };
            if misfits.is_empty() {
                let sum = factors.merged(base)?;
                merged.insert(name, sum);
            }
            mismatched.extend(misfits);
        }
        if missing.is_empty() && mismatched.is_empty() {
            Ok(merged)
        } else {
            Err(Error::Names { missing, unexpected: Vec::new(), mismatched })
        }
    }

    /// Writes the merged model as one safetensors file with the base model's names, from the base model's files. It is
    /// written under another name, synced, and renamed.
    ///
    /// # Errors
    ///
    /// As [`merge`](Self::merge); files that cannot be read or written.
    pub fn save_merged<P: AsRef<Path>>(&self, base: &[P], path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = HashMap::new();
        for file in base {
            let file = file.as_ref();
            let found =
                candle_core::safetensors::load(file, &Device::Cpu).map_err(|error| Error::format(file, error))?;
            tensors.extend(found);
        }
        let merged: BTreeMap<_, _> = self.merge(&tensors)?.into_iter().collect();
        let target = Beside::new(path.as_ref())?;
        target.write_tensors(&merged, &[FORMAT])?;
        target.commit()
    }
}

/// Sorts a file's tensors by what they are.
fn sort(rules: &Rules, tensors: HashMap<String, Tensor>) -> Result<Waiting> {
    let (mut missing, mut unexpected, mut mismatched) = (Vec::new(), Vec::new(), Vec::new());
    let mut halves: BTreeMap<(String, bool), [Option<Tensor>; 2]> = BTreeMap::new();
    let mut waiting = Waiting::default();
    for (name, tensor) in tensors {
        let Some(rest) = name.strip_prefix(PREFIX) else {
            unexpected.push(name);
            continue;
        };
        let is_known = [DType::F64, DType::F32, DType::F16, DType::BF16].contains(&tensor.dtype());
        let half = [(0, false, ".lora_A.weight"), (1, false, ".lora_B.weight")]
            .into_iter()
            .chain([(0, true, ".lora_embedding_A"), (1, true, ".lora_embedding_B")])
            .find_map(|(index, is_embedding, suffix)| Some((index, is_embedding, rest.strip_suffix(suffix)?)));
        if let Some((index, is_embedding, module)) = half {
            if !is_known || tensor.rank() != 2 {
                mismatched.push(format!("{name} {:?} {:?}", tensor.dtype(), tensor.dims()));
                continue;
            }
            let dtype = if tensor.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let tensor = tensor.to_dtype(dtype)?;
            halves.entry((module.to_owned(), is_embedding)).or_default()[index] = Some(tensor);
        } else if rest.split('.').any(|part| part.starts_with("lora_") || part == "modules_to_save") {
            unexpected.push(name);
        } else {
            let (module, last) = rest.rsplit_once('.').unwrap_or(("", rest));
            let module = module.strip_suffix(BASE_LAYER).unwrap_or(module);
            let name = if module.is_empty() { last.to_owned() } else { format!("{module}.{last}") };
            waiting.whole.insert(name, tensor);
        }
    }
    for ((module, is_embedding), [a, b]) in halves {
        let both = names(&module, is_embedding).map(|name| format!("{PREFIX}{name}"));
        let (Some(a), Some(b)) = (&a, &b) else {
            missing.extend(both.into_iter().zip([a, b]).filter(|(_, half)| half.is_none()).map(|(name, _)| name));
            continue;
        };
        let rank = rules.adapter(&module)?.rank;
        if [a.dim(0)?, b.dim(1)?] != [rank; 2] {
            let [a_name, b_name] = both;
            mismatched.push(format!("{a_name} {:?} and {b_name} {:?} for rank {rank}", a.dims(), b.dims()));
            continue;
        }
        // The same module as a linear layer and as an embedding is nonsense.
        let stored = Stored { a: a.clone(), b: b.clone(), is_embedding };
        if waiting.pairs.insert(module.clone(), stored).is_some() {
            unexpected.extend(both);
        }
    }
    if missing.is_empty() && unexpected.is_empty() && mismatched.is_empty() {
        return Ok(waiting);
    }
    for names in [&mut missing, &mut unexpected, &mut mismatched] {
        names.sort();
    }
    Err(Error::Names { missing, unexpected, mismatched })
}

/// A file on its way to its place, which is removed when this is dropped before.
struct Beside {
    temporary: PathBuf,
    target: PathBuf,
}

impl Beside {
    fn new(target: &Path) -> Result<Self> {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let (process, number) = (std::process::id(), FILES.fetch_add(1, Ordering::Relaxed));
        if target.is_dir() {
            let error =
                std::io::Error::new(std::io::ErrorKind::IsADirectory, "expected the path of a file, got a folder");
            return Err(Error::io(target)(error));
        }
        let temporary = target.with_file_name(format!(".{name}.{process}-{number}.saving"));
        Ok(Self { temporary, target: target.to_owned() })
    }

    /// Writes a safetensors file, whose bytes are a function of its content; the format's own crate writes metadata in a
    /// random order.
    fn write_tensors(&self, tensors: &BTreeMap<String, Tensor>, metadata: &[(&str, &str)]) -> Result<()> {
        // Wide types first, so that every tensor is aligned.
        let mut entries: Vec<_> = tensors.iter().collect();
        entries.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));
        let mut header = serde_json::Map::new();
        let metadata: BTreeMap<_, _> = metadata.iter().copied().collect();
        header.insert("__metadata__".into(), json!(metadata));
        let mut start = 0;
        for (name, tensor) in &entries {
            let end = start + tensor.elem_count() * tensor.dtype().size_in_bytes();
            let dtype = Dtype::from(tensor.dtype());
            header
                .insert((*name).clone(), json!({"dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, end]}));
            start = end;
        }
        let mut header = serde_json::Value::from(header).to_string();
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        self.write(|file| {
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            entries.iter().try_for_each(|(_, tensor)| {
                // `data` itself panics where a device cannot be read.
                let near = tensor.to_device(&Device::Cpu).map_err(std::io::Error::other)?;
                file.write_all(&safetensors::View::data(&near))
            })
        })
    }

    /// Writes and syncs the file.
    fn write(&self, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
        let written = File::create(&self.temporary).and_then(|mut file| {
            write(&mut file)?;
            file.sync_all()
        });
        written.map_err(Error::io(&self.temporary))
    }

    fn commit(self) -> Result<()> {
        fs::rename(&self.temporary, &self.target).map_err(Error::io(&self.target))?;
        #[cfg(unix)]
        if let Some(folder) = self.target.parent() {
            let folder = if folder == Path::new("") { Path::new(".") } else { folder };
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
        }
        Ok(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // After a rename there is nothing to remove.
        let _ = fs::remove_file(&self.temporary);
    }
}
