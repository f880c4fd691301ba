//! Settings: what is read, written, refused, and which modules they choose.

use anyhow::Result;
use candle_adapters::{Error, InitLora, Lora, LoraConfig, Modules};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;

const CPU: &Device = &Device::Cpu;

/// The modules that get adapters, of a model with these modules of [4, 4].
fn chosen(config: &LoraConfig, modules: &[&str]) -> Result<Vec<String>> {
    let lora = Lora::new(config.clone(), 0)?;
    lora.build(VarBuilder::zeros(DType::F32, CPU), |vb| {
        modules.iter().try_for_each(|module| vb.pp(module).get((4, 4), "weight").map(drop))
    })?;
    Ok(lora.modules()?)
}

const MODULES: [&str; 7] = [
    "query",
    "bert.layer.0.query",
    "bert.layer.1.my_query",
    "bert.layer.1.query",
    "bert.layer.2.experts.1.query",
    "bert.layer.11.query",
    "lm_head",
];

#[test]
fn modules_are_chosen_as_by_peft() -> Result<()> {
    let config = |target: Modules| LoraConfig { target_modules: target, ..Default::default() };
    let check = |config: LoraConfig, expected: &[usize]| -> Result<()> {
        let mut expected: Vec<_> = expected.iter().map(|index| MODULES[*index]).collect();
        expected.sort();
        assert_eq!(chosen(&config, &MODULES)?, expected, "{config:?}");
        Ok(())
    };
    check(config(["query"].into()), &[0, 1, 3, 4, 5])?;
    check(config(["1.query"].into()), &[3, 4])?;
    check(config(["query".to_owned(), "lm_head".to_owned()].to_vec().into()), &[0, 1, 3, 4, 5, 6])?;
    // Whole names, not parts.
    check(config("query".into()), &[0])?;
    check(config(r".*\.(0|11)\.query|lm_.*".into()), &[1, 5, 6])?;
    check(config(r"bert(?!.*my_).*query".into()), &[1, 3, 4, 5])?;
    check(config("all-linear".into()), &[0, 1, 2, 3, 4, 5])?;
    check(config("ALL-Linear".into()), &[0, 1, 2, 3, 4, 5])?;

    let exclude = |exclude: Modules| LoraConfig { exclude_modules: Some(exclude), ..config(["query"].into()) };
    check(exclude(["0.query", "11.query"].into()), &[0, 3, 4])?;
    check(exclude(r"bert.*1.*".into()), &[0, 1])?;
    let saved = LoraConfig { modules_to_save: vec!["layer.2".into(), "head".into()], ..config(["query"].into()) };
    assert_eq!(chosen(&saved, &MODULES)?, ["bert.layer.0.query", "bert.layer.1.query", "bert.layer.11.query", "query"]);

    let layers = |layers: &[usize], patterns: &[&str]| LoraConfig {
        layers_to_transform: layers.to_vec(),
        layers_pattern: patterns.iter().map(|pattern| (*pattern).to_owned()).collect(),
        ..config(["query", "lm_head"].into())
    };
    // A name that is given whole is chosen in any layer; a number counts whole, and the first one.
    check(layers(&[1], &[]), &[0, 3, 6])?;
    check(layers(&[2, 11], &[]), &[0, 4, 5, 6])?;
    check(layers(&[1], &["layer"]), &[0, 3, 6])?;
    check(layers(&[1], &["experts"]), &[0, 4, 6])?;
    check(layers(&[1], &["blocks", "layer"]), &[0, 3, 6])?;
    Ok(())
}

#[test]
fn ranks_and_scales_are_those_of_the_first_pattern() -> Result<()> {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        rank_pattern: vec![("layer.1.query".into(), 2), (".*1.*query".into(), 3), ("^query".into(), 9)],
        alpha_pattern: vec![("query".into(), 16.0)],
        target_modules: "all-linear".into(),
        init_lora_weights: InitLora::Random,
        ..Default::default()
    };
    for use_rslora in [false, true] {
        let lora = Lora::new(LoraConfig { use_rslora, ..config.clone() }, 0)?;
        let vb = || VarBuilder::zeros(DType::F64, CPU);
        let weight = |vb: VarBuilder<'_>, module: &str| vb.pp(module).get((4, 4), "weight");
        let weights = lora.build(vb(), |vb| {
            MODULES[..6].iter().map(|module| weight(vb.clone(), module)).collect::<candle_core::Result<Vec<_>>>()
        })?;
        let vars = lora.adapter_vars()?;
        for (module, rank, alpha) in [
            ("query", 9, 16.0),
            ("bert.layer.0.query", 4, 16.0),
            ("bert.layer.1.my_query", 3, 8.0),
            ("bert.layer.1.query", 2, 16.0),
            ("bert.layer.2.experts.1.query", 3, 16.0),
            ("bert.layer.11.query", 3, 16.0),
        ] {
            let index = vars.iter().position(|(name, _)| *name == format!("{module}.lora_A.weight")).unwrap();
            let (a, b) = (&vars[index].1, &vars[index + 1].1);
            assert_eq!((a.dims(), b.dims()), (&[rank, 4][..], &[4, rank][..]), "{module}");
            let divisor = if use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            let product = (b.matmul(a)? * (alpha / divisor))?;
            let weight = &weights[MODULES.iter().position(|name| *name == module).unwrap()];
            let error = (weight - product)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-14, "{module}: {error}");
        }
    }
    Ok(())
}

#[test]
fn the_table_is_told_from_linear_layers() -> Result<()> {
    let names = |config: LoraConfig| -> Result<Vec<String>> {
        let lora = Lora::new(config, 0)?;
        lora.build(VarBuilder::zeros(DType::F32, CPU), |vb| {
            candle_nn::embedding(5, 4, vb.pp("token"))?;
            candle_nn::linear_no_bias(4, 4, vb.pp("token_proj"))?;
            // How a layer is built says more than its name; the first request counts, so a tied head changes nothing.
            candle_nn::linear_no_bias(4, 4, vb.pp("embed_proj"))?;
            candle_nn::linear_no_bias(4, 5, vb.pp("token"))?;
            vb.get((5, 4), "wte.weight")?;
            vb.get((5, 4), "layer.word_embeddings.weight").map(drop)
        })?;
        Ok(lora.named_vars()?.into_iter().step_by(2).map(|(name, _)| name).collect())
    };
    let all = LoraConfig { target_modules: ".*".into(), ..Default::default() };
    assert_eq!(
        names(all.clone())?,
        [
            "embed_proj.lora_A.weight",
            "layer.word_embeddings.lora_embedding_A",
            "token.lora_embedding_A",
            "token_proj.lora_A.weight",
            "wte.lora_embedding_A"
        ]
    );
    let linear = LoraConfig { target_modules: "all-linear".into(), ..Default::default() };
    assert_eq!(names(linear)?, ["embed_proj.lora_A.weight", "token_proj.lora_A.weight"]);
    assert_eq!(
        names(LoraConfig { embedding_modules: Some(vec!["token_proj".into()]), ..all })?,
        [
            "embed_proj.lora_A.weight",
            "layer.word_embeddings.lora_A.weight",
            "token.lora_A.weight",
            "token_proj.lora_embedding_A",
            "wte.lora_A.weight"
        ]
    );
    Ok(())
}

#[test]
fn settings_that_are_not_allowed_are_named() {
    let config = LoraConfig { target_modules: ["query"].into(), ..Default::default() };
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let cases = [
        (LoraConfig { r: 0, ..config.clone() }, "invalid `r`: expected at least 1, got 0"),
        (
            LoraConfig { lora_alpha: f64::NAN, ..config.clone() },
            "invalid `lora_alpha`: expected a finite number above 0, got NaN",
        ),
        (
            LoraConfig { lora_dropout: 1.0, ..config.clone() },
            "invalid `lora_dropout`: expected a number in [0, 1), got 1.0",
        ),
        (LoraConfig::default(), "invalid `target_modules`: expected at least one name, or a pattern, got []"),
        (
            LoraConfig { target_modules: [""].into(), ..config.clone() },
            "invalid `target_modules`: expected names that are not empty, got [\"\"]",
        ),
        (
            LoraConfig { target_modules: "(".into(), ..config.clone() },
            "invalid `target_modules`: expected regular expressions, got \"(\": Parsing error at position 1:",
        ),
        (
            LoraConfig { exclude_modules: Some("[".into()), ..config.clone() },
            "invalid `exclude_modules`: expected regular expressions, got",
        ),
        (
            LoraConfig { target_modules: ".*".into(), layers_to_transform: vec![1], ..config.clone() },
            "invalid `layers_to_transform`: expected none, because the target is a pattern, got [1]",
        ),
        (
            LoraConfig { layers_pattern: names(&["h"]), ..config.clone() },
            "invalid `layers_pattern`: expected none, because there is no `layers_to_transform`, got [\"h\"]",
        ),
        (
            LoraConfig { rank_pattern: vec![("q".into(), 0)], ..config.clone() },
            "invalid `rank_pattern`: expected ranks of at least 1, got (\"q\", 0)",
        ),
        (
            LoraConfig { alpha_pattern: vec![("q".into(), 0.0)], ..config.clone() },
            "invalid `alpha_pattern`: expected finite numbers above 0, got (\"q\", 0.0)",
        ),
        (
            LoraConfig { modules_to_save: names(&[""]), ..config.clone() },
            "invalid `modules_to_save`: expected names that are not empty, got [\"\"]",
        ),
    ];
    for (config, expected) in cases {
        let error = Lora::new(config, 0).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
        assert!(matches!(error, Error::Config { .. }));
    }
}

#[test]
fn keys_that_change_numbers_are_refused() {
    let read = |entries: &str| {
        let comma = if entries.is_empty() { "" } else { ", " };
        LoraConfig::from_json(&format!(r#"{{"peft_type": "LORA", "target_modules": ["q"]{comma}{entries}}}"#))
    };
    for (key, value) in [
        ("use_dora", "true"),
        ("use_qalora", "true"),
        ("lora_bias", "true"),
        ("bias", "\"all\""),
        ("bias", "\"lora_only\""),
        ("layer_replication", "[[0, 4]]"),
        ("target_parameters", "[\"experts.down_proj\"]"),
        ("trainable_token_indices", "[1, 2]"),
        ("alora_invocation_tokens", "[1]"),
        ("megatron_config", "{\"a\": 1}"),
        ("velora_config", "{\"scale\": 1.0}"),
        ("kasa_config", "{\"beta\": 1.0}"),
        ("use_bdlora", "{\"nblocks\": 2}"),
        ("arrow_config", "{\"top_k\": 3}"),
        ("monteclora_config", "{\"num_samples\": 8}"),
        ("init_lora_weights", "\"pissa\""),
        ("init_lora_weights", "\"olora\""),
        ("init_lora_weights", "\"mica\""),
        ("a_key_of_tomorrow", "0.5"),
        ("peft_type", "\"IA3\""),
    ] {
        let text = if key == "peft_type" {
            LoraConfig::from_json(&format!(r#"{{"peft_type": {value}, "target_modules": ["q"]}}"#))
        } else {
            read(&format!("\"{key}\": {value}"))
        };
        let error = text.unwrap_err().to_string();
        assert!(error.starts_with(&format!("invalid `{key}`: expected ")), "{error}");
        let value: serde_json::Value = serde_json::from_str(value).unwrap();
        assert!(error.ends_with(&format!("got {value}")), "{error}");
    }
    for harmless in [
        "",
        r#""use_dora": false, "lora_bias": false, "layer_replication": null, "target_parameters": []"#,
        r#""megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.21.2", "loftq_config": {}"#,
        r#""init_lora_weights": "eva", "eva_config": {"rho": 2.0}"#,
        r#""a_key_of_tomorrow": null"#,
    ] {
        assert_eq!(read(harmless).unwrap(), LoraConfig { target_modules: ["q"].into(), ..Default::default() });
    }
    for (wrong, field, expected) in [
        (r#""r": -1"#, "r", "a whole number of at least 1, got -1"),
        (r#""r": 1.5"#, "r", "a whole number of at least 1, got 1.5"),
        (r#""lora_alpha": "8""#, "lora_alpha", r#"a number, got "8""#),
        (r#""rank_pattern": [1]"#, "rank_pattern", "whole numbers by pattern, got [1]"),
        (r#""rank_pattern": {"q": "8"}"#, "rank_pattern", r#"whole numbers by pattern, got {"q":"8"}"#),
        (r#""exclude_modules": 3"#, "exclude_modules", "names or a pattern, got 3"),
        (r#""exclude_modules": ["a", 3]"#, "exclude_modules", r#"names or a pattern, got ["a",3]"#),
        (r#""layers_to_transform": "1""#, "layers_to_transform", r#"a whole number or several, got "1""#),
        (r#""use_rslora": "yes""#, "use_rslora", r#"true or false, got "yes""#),
        (r#""modules_to_save": {}"#, "modules_to_save", "a list of names, got {}"),
        (r#""revision": 7"#, "revision", "a text, got 7"),
    ] {
        let error = read(wrong).unwrap_err();
        assert_eq!(error.to_string(), format!("invalid `{field}`: expected {expected}"));
    }
    for text in ["nonsense", "[1]", "", "{\"r\": }"] {
        let error = LoraConfig::from_json(text).unwrap_err().to_string();
        assert!(error.starts_with("invalid `adapter_config.json`: expected an object of JSON, got "), "{error}");
        for word in ["struct", "enum", "usize", "variant"] {
            assert!(!error.contains(word), "{error}");
        }
    }
    let error = LoraConfig::from_json("{}").unwrap_err().to_string();
    assert_eq!(error, "invalid `peft_type`: expected \"LORA\", got null");
    // Of a key that is there twice, Python takes the last value.
    assert_eq!(read(r#""r": 3, "r": 5"#).unwrap().r, 5);
}

#[test]
fn settings_are_written_as_they_are_read() -> Result<()> {
    let config = LoraConfig {
        r: 5,
        lora_alpha: 0.3,
        lora_dropout: 0.1,
        target_modules: ["a", "b"].into(),
        exclude_modules: Some("x.*".into()),
        layers_to_transform: vec![3, 1],
        layers_pattern: vec!["layers".into()],
        rank_pattern: vec![("a".into(), 1), ("b".into(), 2)],
        alpha_pattern: vec![("a".into(), 0.1), ("b".into(), 4.0)],
        use_rslora: true,
        fan_in_fan_out: true,
        ensure_weight_tying: true,
        modules_to_save: vec!["head".into()],
        init_lora_weights: InitLora::Gaussian,
        embedding_modules: None,
        base_model_name_or_path: Some("base".into()),
        revision: Some("main".into()),
        task_type: Some("SEQ_CLS".into()),
    };
    assert_eq!(LoraConfig::from_json(&config.to_json())?, config);
    let plain = LoraConfig { target_modules: "all-linear".into(), ..Default::default() };
    assert_eq!(LoraConfig::from_json(&plain.to_json())?, plain);
    assert!(plain.to_json().contains("\"lora_alpha\": 8,"), "{}", plain.to_json());
    // The order of the file counts, and one value stands for a list.
    let text = r#"{"peft_type": "LORA", "target_modules": ["q"], "rank_pattern": {"z": 1, "a": 2},
        "layers_to_transform": 4, "layers_pattern": "h"}"#;
    let read = LoraConfig::from_json(text)?;
    assert_eq!(read.rank_pattern, [("z".to_owned(), 1), ("a".to_owned(), 2)]);
    assert_eq!((read.layers_to_transform, read.layers_pattern), (vec![4], vec!["h".to_owned()]));
    Ok(())
}

#[test]
fn entries_that_match_nothing_are_named() -> Result<()> {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let config = LoraConfig {
        target_modules: ["query", "kye"].into(),
        exclude_modules: Some(["kye"].into()),
        layers_to_transform: vec![1, 40],
        modules_to_save: names(&["haed"]),
        rank_pattern: vec![("query".into(), 2), ("valeu".into(), 3)],
        alpha_pattern: vec![("quer".into(), 3.0)],
        embedding_modules: Some(names(&["tabel"])),
        ..Default::default()
    };
    let lora = Lora::new(config, 0)?;
    let build = |lora: &Lora| {
        lora.build(VarBuilder::zeros(DType::F32, CPU), |vb| {
            MODULES.iter().try_for_each(|module| vb.pp(module).get((4, 4), "weight").map(drop))
        })
    };
    let Err(error) = build(&lora) else { panic!("it is built") };
    let error = error.to_string();
    let expected = "no module of the model matches `target_modules` \"kye\", `exclude_modules` \"kye\", \
                    `layers_to_transform` 40, `rank_pattern` \"valeu\", `alpha_pattern` \"quer\", `modules_to_save` \
                    \"haed\", `embedding_modules` \"tabel\"; it has 7 modules: bert.layer.0.query, ";
    assert!(error.starts_with(expected), "{error}");
    let pattern =
        LoraConfig { target_modules: "all-linear".into(), exclude_modules: Some("kye.*".into()), ..Default::default() };
    assert!(
        matches!(chosen(&pattern, &MODULES), Err(error) if error.to_string().contains("`exclude_modules` \"kye.*\""))
    );
    // A module that is saved whole, or without a weight of its own, is there all the same.
    let saved = LoraConfig {
        target_modules: ["query", "lm_head"].into(),
        modules_to_save: names(&["lm_head", "scale"]),
        ..Default::default()
    };
    let lora = Lora::new(saved, 0)?;
    lora.build(VarBuilder::zeros(DType::F32, CPU), |vb| {
        vb.get(3, "scale.bias")?;
        vb.get((4, 4), "query.weight")?;
        vb.get((4, 4), "lm_head.weight")
    })?;
    assert_eq!(lora.modules()?, ["query"]);
    assert_eq!(lora.saved_vars()?.len(), 2);
    Ok(())
}

#[test]
fn ranks_beyond_reason_are_refused() -> Result<()> {
    let query = |r: usize| LoraConfig { r, target_modules: ["query"].into(), ..Default::default() };
    // PEFT allows ranks above the dimensions.
    assert_eq!(chosen(&query(64), &["query"])?, ["query"]);
    for r in [usize::MAX, 1 << 40, (1 << 21) + 1] {
        let error = chosen(&query(r), &["query"]).unwrap_err().to_string();
        let expected =
            "invalid `r`: expected at most 2097152 for \"query\", whose matrices are [r, 4] and [4, r], got ";
        assert_eq!(error, format!("{expected}{r}"));
    }
    let pattern = LoraConfig { rank_pattern: vec![("query".into(), usize::MAX)], ..query(8) };
    let error = chosen(&pattern, &["query"]).unwrap_err().to_string();
    assert!(error.starts_with("invalid `rank_pattern`: expected at most "), "{error}");
    Ok(())
}

#[test]
fn nothing_is_there_before_a_model_is_built() -> Result<()> {
    let lora = Lora::new(LoraConfig { target_modules: ["query"].into(), ..Default::default() }, 0)?;
    let vb = || VarBuilder::zeros(DType::F32, CPU);
    let errors = [
        lora.named_vars().err(),
        lora.modules().err(),
        lora.refresh().err(),
        lora.verify().err(),
        lora.save("nowhere").err(),
        lora.build_merged(vb(), |vb| Ok::<_, Error>(vb.get((4, 4), "query.weight")?)).err(),
    ];
    for error in errors {
        let error = error.map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("no model has been built with these adapters; call `build` first"));
    }
    Ok(())
}
