//! Which files are understood, and what is written.

use serde_json::json;

use super::*;

fn complete() -> Value {
    json!({
        "architectures": ["BertModel"], "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 7, "type_vocab_size": 2,
        "hidden_act": "gelu_new", "transformers_version": "4.8.2"
    })
}

#[test]
fn what_is_not_understood_is_an_error_that_names_it() -> Result<()> {
    let refused = |field: &str, value: Value| -> Result<String> {
        let mut config = complete();
        config[field] = value;
        let config: Config = serde_json::from_value(config)?;
        Ok(config.check().expect_err("refused").to_string())
    };
    assert_eq!(refused("model_type", json!("roberta"))?, r#"model_type: expected "bert", got "roberta""#);
    assert!(refused("position_embedding_type", json!("relative_key"))?.contains("relative_key"));
    let heads = "num_attention_heads: expected a divisor of hidden_size, 8, got";
    assert_eq!(refused("num_attention_heads", json!(3))?, format!("{heads} 3"));
    assert_eq!(refused("num_attention_heads", json!(0))?, format!("{heads} 0"));
    assert_eq!(refused("hidden_dropout_prob", json!(1.0))?, "hidden_dropout_prob: expected a number in [0, 1), got 1");
    assert_eq!(refused("vocab_size", json!(0))?, "vocab_size: expected at least 1, got 0");

    let mut config = complete();
    config["hidden_act"] = json!("swish");
    let error = serde_json::from_value::<Config>(config).expect_err("refused").to_string();
    assert!(error.contains("swish") && error.contains("gelu_new"), "{error}");
    Ok(())
}

#[test]
fn what_is_not_said_is_the_default_of_transformers_and_what_is_not_known_is_kept() -> Result<()> {
    let config: Config = serde_json::from_value(complete())?;
    config.check()?;
    assert_eq!((config.hidden_act, config.layer_norm_eps), (Activation::GeluTanh, 1e-12));
    assert_eq!((config.hidden_dropout_prob, config.pad_token_id), (0.1, Some(0)));
    assert_eq!(serde_json::to_value(&config)?["transformers_version"], "4.8.2");
    Ok(())
}

#[test]
fn classes_have_an_order() -> Result<()> {
    let labels: Vec<String> = (0..12).map(|i| format!("class {i}")).collect();
    let mut config: Config = serde_json::from_value(complete())?;
    assert!(!config.has_labels(&labels));
    config.set_labels(&labels);
    assert!(config.has_labels(&labels) && !config.has_labels(&labels[..11]));
    let saved: Config = serde_json::from_value(serde_json::to_value(&config)?)?;
    assert!(saved.has_labels(&labels));
    let swapped: Vec<String> = labels.iter().rev().cloned().collect();
    assert!(!saved.has_labels(&swapped));
    assert_eq!(serde_json::to_value(&config)?["id2label"]["10"], "class 10");
    Ok(())
}

#[test]
fn fields_that_are_null_or_not_there_are_those_of_bert_base() -> Result<()> {
    let nothing: Config = serde_json::from_value(json!({}))?;
    nothing.check()?;
    let Config { vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, .. } = nothing;
    assert_eq!((vocab_size, hidden_size, num_hidden_layers), (30_522, 768, 12));
    assert_eq!((num_attention_heads, intermediate_size), (12, 3072));
    assert_eq!((nothing.max_position_embeddings, nothing.type_vocab_size), (512, 2));
    assert_eq!((nothing.classifier_dropout, nothing.initializer_range), (None, 0.02));

    let written = serde_json::to_value(&nothing)?;
    let nulls: Map<String, Value> = written
        .as_object()
        .context("an object")?
        .keys()
        .map(String::as_str)
        .chain(["id2label", "label2id", "classifier_pooling", "use_cache"])
        .map(|name| (name.to_owned(), Value::Null))
        .collect();
    let mut config: Config = serde_json::from_value(nulls.into())?;
    config.check()?;
    // The one whose null means something, and the one that is not known.
    assert_eq!((config.pad_token_id.take(), config.padding()), (None, 0));
    assert_eq!(config.other.remove("use_cache"), Some(Value::Null));
    config.pad_token_id = Some(0);
    assert_eq!(config, nothing);
    Ok(())
}

#[test]
fn fields_of_other_types_are_read_where_they_say_the_same_or_are_not_needed() -> Result<()> {
    let read = |field: &str, value: Value| -> Result<Config> {
        let mut config = complete();
        config[field] = value;
        let config: Config = serde_json::from_value(config)?;
        config.check()?;
        Ok(config)
    };
    assert_eq!(read("hidden_size", json!(8.0))?.hidden_size, 8);
    assert_eq!(read("hidden_dropout_prob", json!(0))?.hidden_dropout_prob, 0.0);
    assert_eq!(read("classifier_dropout", json!(0.25))?.classifier_dropout, Some(0.25));
    assert_eq!(read("pad_token_id", json!(-1))?.padding(), 8);
    assert_eq!(read("pad_token_id", json!(3.0))?.padding(), 3);
    assert_eq!(read("hidden_act", json!("gelu_fast"))?.hidden_act, Activation::GeluTanh);
    assert_eq!(read("id2label", json!({"0": 7, "1": "b"}))?.id2label["0"], "7");
    assert!(read("id2label", json!(["a", "b"]))?.id2label.is_empty());
    assert!(read("label2id", json!({"a": "0"}))?.label2id.is_empty());
    for value in [json!(null), json!("0"), json!([1])] {
        assert_eq!(read("eos_token_id", value.clone())?.other["eos_token_id"], value);
    }

    let refused = |field: &str, value: Value| read(field, value).expect_err(field).to_string();
    assert_eq!(refused("hidden_size", json!("8")), "hidden_size: expected a whole number, got \"8\"");
    assert_eq!(refused("vocab_size", json!(-9)), "vocab_size: expected a whole number, got -9");
    assert_eq!(refused("pad_token_id", json!("0")), "pad_token_id: expected a whole number or null, got \"0\"");
    assert_eq!(refused("pad_token_id", json!(9)), "pad_token_id: expected a token below vocab_size, 9, got 9");
    for (field, value) in
        [("layer_norm_eps", json!("1e-12")), ("hidden_act", json!(1)), ("classifier_pooling", json!("max"))]
    {
        let error = refused(field, value);
        assert!(error.starts_with(&format!("{field}: ")), "{error}");
    }
    assert!(refused("is_decoder", json!(true)).starts_with("is_decoder: expected false"));
    Ok(())
}

#[test]
fn one_field_says_the_dtype_by_the_name_that_the_source_has() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("finetune-config-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    for (source, field) in [
        (json!({}), "torch_dtype"),
        (json!({"torch_dtype": "float16"}), "torch_dtype"),
        (json!({"dtype": "float16"}), "dtype"),
        (json!({"dtype": null}), "dtype"),
        (json!({"dtype": "float16", "torch_dtype": "float16"}), "dtype"),
    ] {
        // As Notepad saves it.
        fs::write(folder.join(CONFIG), format!("\u{feff}{source}"))?;
        let mut config = Config::read(&folder)?;
        config.other.insert("quantization_config".into(), json!({"bits": 8}));
        config.other.insert("num_labels".into(), json!(3));
        config.other.insert("problem_type".into(), json!("regression"));
        config.set_labels(&["a".into(), "b".into()]);
        config.save(&folder, "bfloat16")?;
        let saved: Map<String, Value> = read_json(&folder.join(CONFIG))?;
        let dtypes: Vec<(&str, &Value)> = saved
            .iter()
            .filter(|(name, _)| name.contains("dtype"))
            .map(|(name, value)| (name.as_str(), value))
            .collect();
        assert_eq!(dtypes, [(field, &json!("bfloat16"))], "{source}");
        assert!(!saved.contains_key("quantization_config") && !saved.contains_key("num_labels"));
        assert_eq!(saved["problem_type"], "single_label_classification");
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}
