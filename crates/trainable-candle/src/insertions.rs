//! The changes to candle-nn: lines that are inserted into files whose content is known.

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// The releases of candle-nn whose sources are known.
pub(crate) const VERSIONS: [&str; 2] = ["0.11.0", "0.11.1"];

/// The file with the functions that the inserted lines call.
pub(crate) const ADDED_FILE: (&str, &str) = ("src/trainable.rs", include_str!("../inserted/trainable.rs"));

/// A file that is changed.
pub(crate) struct Changed {
    /// The path below the folder of candle-nn.
    pub(crate) path: &'static str,
    /// The SHA-256 in each of [`VERSIONS`], and nothing where the release has no such file.
    sha256: [&'static str; VERSIONS.len()],
    insertions: &'static [Insertion],
}

/// Lines that follow the end of the last of `anchors`, each of which is looked for behind the one before it.
struct Insertion {
    anchors: &'static [&'static str],
    lines: &'static str,
}

impl Changed {
    /// Whether this release has the file. The version is an index into [`VERSIONS`].
    pub(crate) fn is_in(&self, version: usize) -> bool {
        !self.sha256[version].is_empty()
    }

    /// The content with all insertions.
    pub(crate) fn apply(&self, version: usize, content: &[u8]) -> Result<String> {
        let found = sha256(content);
        ensure!(
            found == self.sha256[version],
            "{} is not the file of candle-nn {} (SHA-256 {found}, not {})",
            self.path,
            VERSIONS[version],
            self.sha256[version],
        );
        let mut text = std::str::from_utf8(content)?.to_owned();
        for insertion in self.insertions {
            insertion.apply(&mut text, self.path)?;
        }
        Ok(text)
    }
}

impl Insertion {
    fn apply(&self, text: &mut String, path: &str) -> Result<()> {
        let mut at = 0;
        for (i, anchor) in self.anchors.iter().enumerate() {
            let found = text[at..].find(anchor).with_context(|| format!("{path}: no {anchor:?}"))?;
            if i == 0 && text[found + 1..].contains(anchor) {
                bail!("{path}: more than one {anchor:?}");
            }
            at += found + anchor.len();
        }
        let comment = if path.ends_with(".toml") { "#" } else { "//" };
        text.insert_str(at, &format!("{comment} Inserted by trainable-candle.\n{}", self.lines));
        Ok(())
    }
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The end of the line that opens the body of a function.
const BODY: &str = "{\n";

/// All files that are changed. No name here or in the inserted lines is longer than what calling the function takes.
pub(crate) const CHANGED: &[Changed] = &[
    Changed {
        path: "Cargo.toml",
        sha256: [
            "60eb01828ad74bf5acb60126fe22d2ee366bf316f368b869592d91dd33c3b64c",
            "5df7737bd46878014abdca6273c5f0b5fdce17ba122eb574b8adcbb4369cf903",
        ],
        insertions: &[Insertion {
            anchors: &["[dependencies.candle]\n", "\n\n"],
            lines: "[dependencies.candle-graft]\npath = \"../candle-graft\"\n\n",
        }],
    },
    Changed {
        path: "src/activation.rs",
        sha256: [
            "29e39dd7004e50d0868d98863cced5a29be76c7dd1c7639edeb3d872bd6db1fc",
            "29e39dd7004e50d0868d98863cced5a29be76c7dd1c7639edeb3d872bd6db1fc",
        ],
        insertions: &[Insertion {
            anchors: &["impl super::Module for Activation {", "fn forward(", BODY],
            lines: "        if xs.track_op() {
            match self {
                Self::Gelu => return candle_graft::gelu(xs),
                Self::NewGelu | Self::GeluPytorchTanh => return candle_graft::gelu_tanh(xs),
                Self::Silu | Self::Swish => return candle_graft::silu(xs),
                _ => {}
            }
        }
",
        }],
    },
    Changed {
        path: "src/attention/cpu_flash/causal.rs",
        sha256: [
            "7d28116e839c83e7481b20594b9f63e0e5d9df8c9a2aa7a9c1810c7ab8fe979a",
            "7d28116e839c83e7481b20594b9f63e0e5d9df8c9a2aa7a9c1810c7ab8fe979a",
        ],
        insertions: &[Insertion {
            anchors: &["pub fn run_causal_attn_cpu<", BODY],
            lines: "    let mask = crate::attention::AttnMask::Causal { kv_offset };
    if let Some(result) = crate::trainable::flash_attn(q, k, v, softmax_scale, &mask, max_bias, softcap)? {
        return Ok(result);
    }
",
        }],
    },
    Changed {
        path: "src/attention/cpu_flash/mod.rs",
        sha256: [
            "81b096395743b69520b8890f2512169603e7de02583c13a558fce6c7eceb4fbe",
            "81b096395743b69520b8890f2512169603e7de02583c13a558fce6c7eceb4fbe",
        ],
        insertions: &[Insertion {
            anchors: &["pub fn flash_attn<", BODY],
            lines: "    if let Some(result) = crate::trainable::flash_attn(q, k, v, softmax_scale, &attn_mask, max_bias, softcap)? {
        return Ok(result);
    }
",
        }],
    },
    Changed {
        path: "src/attention/cpu_flash/standard.rs",
        sha256: [
            "5d6ebcc7786abd0af4ef468550d0f0f53448cbe94b1c04b585f086528cbad517",
            "7a11b5d87c119f2641c32d24703fa4ba51b5b7e30011eed901db11f76428504a",
        ],
        insertions: &[Insertion {
            anchors: &["pub fn run_flash_attn_cpu<", BODY],
            lines: "    let tracked_mask = mask.cloned().map_or_else(Default::default, crate::attention::AttnMask::Mask);
    if let Some(result) = crate::trainable::flash_attn(q, k, v, softmax_scale, &tracked_mask, max_bias, softcap)? {
        return Ok(result);
    }
",
        }],
    },
    Changed {
        path: "src/attention/cpu_flash/varlen.rs",
        sha256: [
            "745f330f7b2d4f93423ac2867f1ec91d85f6f056e61114123e5b5fd861f4286d",
            "745f330f7b2d4f93423ac2867f1ec91d85f6f056e61114123e5b5fd861f4286d",
        ],
        insertions: &[Insertion {
            anchors: &["pub fn flash_attn_varlen_cpu(", BODY],
            lines: "    let window = (window_left, window_right);
    let (lens_q, lens_k) = (seqlens_q, seqlens_k);
    if let Some(result) = crate::trainable::flash_attn_varlen(
        q, k, v, alibi_slopes, lens_q, lens_k, softmax_scale, causal, window,
    )? {
        return Ok(result);
    }
",
        }],
    },
    Changed {
        path: "src/kv_cache.rs",
        sha256: [
            "67fa32cce0e7f05bc19b305760f555509d0d73731b40aa43974fd24a70408e17",
            "67fa32cce0e7f05bc19b305760f555509d0d73731b40aa43974fd24a70408e17",
        ],
        insertions: &[
            Insertion {
                anchors: &["impl Cache {", "pub fn append(", BODY],
                lines: "        if crate::trainable::tracked([src, self.all_data.as_ref().unwrap_or(src)]) {
            let data = crate::trainable::appended(self.current_data()?.as_ref(), src, self.dim)?;
            self.current_seq_len = data.dim(self.dim)?;
            self.all_data = Some(data);
            return Ok(());
        }
",
            },
            Insertion {
                anchors: &["impl RotatingCache {", "pub fn append(", BODY],
                lines: "        if crate::trainable::tracked([src, self.all_data.as_ref().unwrap_or(src)]) {
            let (seq_len, max, at) = (src.dim(self.dim)?, self.max_seq_len, self.offset);
            let fits = seq_len.min(max - at);
            let (data, result) = if seq_len >= max {
                (src.narrow(self.dim, seq_len - max, max)?.force_contiguous()?, Some(src.clone()))
            } else {
                let mut shape = src.dims().to_vec();
                shape[self.dim] = max;
                let data = match &self.all_data {
                    Some(data) => data.clone(),
                    None => Tensor::zeros(shape, src.dtype(), src.device())?,
                };
                let data = data.slice_scatter(&src.narrow(self.dim, 0, fits)?, self.dim, at)?;
                let rest = src.narrow(self.dim, fits, seq_len - fits)?;
                let data = if fits < seq_len { data.slice_scatter(&rest, self.dim, 0)? } else { data };
                (data.contiguous()?, None)
            };
            self.offset = if seq_len >= max { 0 } else { (at + seq_len) % max };
            self.current_seq_len += seq_len;
            self.all_data = Some(data.clone());
            return match result {
                Some(result) => Ok(result),
                None => data.narrow(self.dim, 0, self.current_seq_len.min(max)),
            };
        }
",
            },
            Insertion {
                anchors: &["impl ScatteredKvCache {", "pub fn append(", BODY],
                lines: "        if self.context > k.dim(2)? {
            crate::trainable::inference_only(\"ScatteredKvCache\", &[Some(k), Some(v)])?;
        }
",
            },
            Insertion {
                anchors: &["impl ConcatKvCache {", "pub fn append(", BODY],
                lines: "        let cached = [self.k.as_ref().unwrap_or(k), self.v.as_ref().unwrap_or(v)];
        if crate::trainable::tracked([k, v, cached[0], cached[1]]) {
            let k = crate::trainable::appended(self.k.as_ref(), k, self.dim)?;
            let v = crate::trainable::appended(self.v.as_ref(), v, self.dim)?;
            (self.k, self.v) = (Some(k.clone()), Some(v.clone()));
            return Ok((k, v));
        }
",
            },
            Insertion {
                anchors: &["impl InterleavedKvCache {", "pub fn append(", BODY],
                lines: "        crate::trainable::inference_only(\"InterleavedKvCache\", &[Some(k), Some(v)])?;
",
            },
        ],
    },
    Changed {
        path: "src/layer_norm.rs",
        sha256: [
            "c3a6b107d63e57323392728de9c7cc208d450b24c6ac8c385fbd65e6ea4dfe42",
            "73d17ab82a01c19ca246ffe46e827a924830c943301daa34b5de89ae02526a37",
        ],
        insertions: &[Insertion {
            anchors: &["impl Module for LayerNorm {", "fn forward(", BODY],
            lines: "        let (weight, bias) = (&self.weight, self.bias.as_ref());
        // Parameters of other shapes are broadcast below.
        let fits = |of: &Tensor| of.rank() == 1 && of.dims().last() == x.dims().last();
        let fits = fits(weight) && bias.map_or(true, fits);
        if fits && crate::trainable::tracked([x, weight, bias.unwrap_or(x)]) {
            return match bias {
                bias if self.remove_mean => candle_graft::layer_norm(x, weight, bias, self.eps),
                None => candle_graft::rms_norm(x, weight, self.eps),
                Some(bias) => candle_graft::rms_norm(x, weight, self.eps)?.broadcast_add(bias),
            };
        }
",
        }],
    },
    Changed {
        path: "src/lib.rs",
        sha256: [
            "9a568a854f35b1d7f866015f01e5d8f138180b4f6790fd181b6d80bb9a6a211d",
            "9a568a854f35b1d7f866015f01e5d8f138180b4f6790fd181b6d80bb9a6a211d",
        ],
        insertions: &[Insertion { anchors: &["pub mod sequential;\n"], lines: "mod trainable;\n" }],
    },
    Changed {
        path: "src/linear.rs",
        sha256: [
            "c7827f685ef90affe4cefee1d133e9acdbd2489125e6f47f233f62e289a9c658",
            "c7827f685ef90affe4cefee1d133e9acdbd2489125e6f47f233f62e289a9c658",
        ],
        insertions: &[Insertion {
            anchors: &["impl super::Module for Linear {", "fn forward(", BODY],
            lines: "        let bias = self.bias.as_ref();
        // A bias of another shape is broadcast below.
        let fits = bias.map_or(true, |bias| self.weight.dims().get(..1) == Some(bias.dims()));
        if fits && crate::trainable::tracked([x, &self.weight, bias.unwrap_or(x)]) {
            return candle_graft::linear(x, &self.weight, bias);
        }
",
        }],
    },
    Changed {
        path: "src/loss.rs",
        sha256: [
            "53fd5ec03c94ee5e88f44ef896a5cefa7c921a91455090fb702c880b6d9ce3cb",
            "53fd5ec03c94ee5e88f44ef896a5cefa7c921a91455090fb702c880b6d9ce3cb",
        ],
        insertions: &[Insertion {
            anchors: &["pub fn cross_entropy(", BODY],
            lines: "    if inp.track_op() {
        return candle_graft::cross_entropy(inp, target);
    }
",
        }],
    },
    Changed {
        path: "src/moe.rs",
        sha256: [
            "aa68db57e89a9788dbec8738c93d7879b011bb8f88f0369890061d377bddc8ee",
            "c9cf96f2f07b07b8aff97703a3568d45db4f366d721a3d92e794e6999484c365",
        ],
        insertions: &[
            Insertion {
                anchors: &["fn moe_gemm(\n    input", BODY],
                lines: "    crate::trainable::inference_only(\"moe_gemm\", &[Some(input), Some(weights), topk_weights.as_ref()])?;
",
            },
            Insertion {
                anchors: &["fn moe_gemm_gguf(\n    input", BODY],
                lines: "    crate::trainable::inference_only(\"moe_gemm_gguf\", &[Some(input), topk_weights.as_ref()])?;
",
            },
        ],
    },
    Changed {
        path: "src/moe/cutile.rs",
        sha256: ["", "686550bdfb76b92837fd86a85bae92dd935755b5b8fea1a9db6f97b2119b1808"],
        insertions: &[Insertion {
            anchors: &["pub fn routed_grouped_matmul(", BODY],
            lines: "    let args = [Some(input), Some(expert_weights), route_weights];
    crate::trainable::inference_only(\"routed_grouped_matmul\", &args)?;
",
        }],
    },
    Changed {
        path: "src/ops.rs",
        sha256: [
            "5f3342ddd29441833f3739931b532c5f66ff45b107fd4f867d198370f17887e5",
            "5f3342ddd29441833f3739931b532c5f66ff45b107fd4f867d198370f17887e5",
        ],
        insertions: &[
            Insertion {
                anchors: &["pub fn softmax<", BODY],
                lines: "    if xs.track_op() {
        return candle_graft::softmax(xs, dim);
    }
",
            },
            Insertion {
                anchors: &["pub fn log_softmax<", BODY],
                lines: "    if xs.track_op() {
        return candle_graft::log_softmax(xs, d);
    }
",
            },
            Insertion {
                anchors: &["pub fn silu(", BODY],
                lines: "    if xs.track_op() {
        return candle_graft::silu(xs);
    }
",
            },
            Insertion {
                anchors: &["pub fn softmax_last_dim(", BODY],
                lines: "    if xs.track_op() {
        return candle_graft::softmax_last_dim(xs);
    }
",
            },
            Insertion {
                anchors: &["pub fn rms_norm(", BODY],
                lines: "    if crate::trainable::tracked([xs, alpha]) {
        return candle_graft::rms_norm(xs, alpha, eps.into());
    }
",
            },
            Insertion {
                anchors: &["pub fn layer_norm(", BODY],
                lines: "    if crate::trainable::tracked([xs, alpha, beta]) {
        return candle_graft::layer_norm(xs, alpha, Some(beta), eps.into());
    }
",
            },
            Insertion {
                anchors: &["pub fn sdpa(", BODY],
                lines: "    if let Some(result) = crate::trainable::sdpa(q, k, v, mask, do_causal, scale, softcapping)? {
        return Ok(result);
    }
",
            },
        ],
    },
    Changed {
        path: "src/rotary_emb.rs",
        sha256: [
            "49259a559ee10e959a7209cc7c7c63c643726ea2a014482a0cc978aaa3af84c8",
            "49259a559ee10e959a7209cc7c7c63c643726ea2a014482a0cc978aaa3af84c8",
        ],
        insertions: &[
            Insertion {
                anchors: &["pub fn rope_i(", BODY],
                lines: "    if crate::trainable::tracked([xs, cos, sin]) {
        return candle_graft::rope_i(xs, cos, sin);
    }
",
            },
            Insertion {
                anchors: &["pub fn rope(", BODY],
                lines: "    if crate::trainable::tracked([xs, cos, sin]) {
        return candle_graft::rope(xs, cos, sin);
    }
",
            },
            Insertion {
                anchors: &["pub fn rope_thd(", BODY],
                lines: "    if crate::trainable::tracked([xs, cos, sin]) {
        return candle_graft::rope_thd(xs, cos, sin);
    }
",
            },
        ],
    },
];
