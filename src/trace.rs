//! A span of the crate `tracing` for each call of an optimizer, with the feature of that name; nothing without it.

#[cfg(feature = "tracing")]
mod imp {
    use tracing::field::Empty;
    use tracing::span::EnteredSpan;

    /// Warns that a GPU has no kernels of this crate, so that candle's tensor operations update its variables.
    #[cfg(feature = "cuda")]
    pub(crate) fn no_kernels(gpu: &str, cause: &str) {
        tracing::warn!(gpu, cause, "no CUDA kernels: candle's tensor operations are used");
    }

    /// One call of `step`, as long as it lives.
    pub(crate) struct Call(EnteredSpan);

    impl Call {
        /// Enters the span of call `call` of an optimizer.
        pub(crate) fn enter(optimizer: &str, call: u64) -> Self {
            let span =
                tracing::debug_span!("adamax.step", optimizer, call, lr = Empty, updated = Empty, skipped = Empty);
            Self(span.entered())
        }

        /// Says what became of it, as far as it is known: a GPU is not waited for.
        pub(crate) fn record(&self, lr: f64, updated: bool, skipped: Option<bool>) {
            self.0.record("lr", lr);
            if let Some(skipped) = skipped {
                self.0.record("updated", updated && !skipped);
                self.0.record("skipped", skipped);
            }
        }
    }
}

#[cfg(not(feature = "tracing"))]
mod imp {
    #[cfg(feature = "cuda")]
    pub(crate) fn no_kernels(_: &str, _: &str) {}

    /// Nothing.
    pub(crate) struct Call;

    impl Call {
        #[inline(always)]
        pub(crate) fn enter(_: &str, _: u64) -> Self {
            Self
        }

        #[inline(always)]
        pub(crate) fn record(&self, _: f64, _: bool, _: Option<bool>) {}
    }
}

pub(crate) use imp::Call;
#[cfg(feature = "cuda")]
pub(crate) use imp::no_kernels;
