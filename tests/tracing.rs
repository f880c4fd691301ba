//! Spans of steps, as a subscriber hears them: `cargo test --release --features tracing --test tracing`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use candle_adamax::{Adamax, ParamsAdamax};
use candle_core::{Device, Tensor, Var};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

#[derive(Default)]
struct Span {
    name: &'static str,
    level: Option<Level>,
    fields: BTreeMap<&'static str, String>,
    is_entered: bool,
    is_exited: bool,
}

impl Visit for Span {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }
}

/// All spans, in their order.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Vec<Span>>>);

impl Listener {
    fn of<R>(&self, id: &Id, f: impl FnOnce(&mut Span) -> R) -> R {
        f(&mut self.0.lock().unwrap()[id.into_u64() as usize - 1])
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target().starts_with("candle_adamax")
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let metadata = attributes.metadata();
        let mut span = Span { name: metadata.name(), level: Some(*metadata.level()), ..Span::default() };
        attributes.record(&mut span);
        let mut spans = self.0.lock().unwrap();
        spans.push(span);
        Id::from_u64(spans.len() as u64)
    }

    fn record(&self, id: &Id, values: &Record<'_>) {
        self.of(id, |span| values.record(span));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, id: &Id) {
        self.of(id, |span| span.is_entered = true);
    }

    fn exit(&self, id: &Id) {
        self.of(id, |span| span.is_exited = true);
    }
}

#[test]
fn a_span_tells_of_each_call() -> candle_core::Result<()> {
    let listener = Listener::default();
    tracing::subscriber::set_global_default(listener.clone()).unwrap();
    let w = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    let params = ParamsAdamax { name: "Encoder".into(), lr: 0.5.into(), skip_nonfinite: true, ..Default::default() };
    let mut optimizer = Adamax::from_named([("w", w.clone())], params)?;
    for grad in [[1f32, 1.0], [1.0, f32::NAN], [2.0, 3.0]] {
        let grad = Tensor::new(&grad, &Device::Cpu)?;
        optimizer.apply_gradients([(&w, &grad)])?;
    }
    // A call that fails has a span, too, of which nothing more is known.
    let grad = Tensor::new(&[1f32], &Device::Cpu)?;
    assert!(optimizer.apply_gradients([(&w, &grad)]).is_err());

    let spans = listener.0.lock().unwrap();
    assert_eq!(spans.len(), 4);
    let told = [
        &[("call", "0"), ("lr", "0.5"), ("optimizer", "\"Encoder\""), ("skipped", "false"), ("updated", "true")][..],
        &[("call", "1"), ("lr", "0.5"), ("optimizer", "\"Encoder\""), ("skipped", "true"), ("updated", "false")],
        &[("call", "1"), ("lr", "0.5"), ("optimizer", "\"Encoder\""), ("skipped", "false"), ("updated", "true")],
        &[("call", "2"), ("optimizer", "\"Encoder\"")],
    ];
    for (span, told) in spans.iter().zip(told) {
        assert_eq!((span.name, span.level), ("adamax.step", Some(Level::DEBUG)));
        assert!(span.is_entered && span.is_exited);
        let fields: Vec<(&str, &str)> = span.fields.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(fields, told);
    }
    Ok(())
}
