//! Norms of gradients, for those who log them or clip by hand.

use candle_core::backprop::GradStore;

use super::Adamax;
use super::collect::{Found, collect};
use super::gradients::Gradients;
use crate::error::Result;
use crate::kernel::Context;
use crate::reduce::NormType;

impl Adamax {
    /// The norm of the gradient of each variable that has one in `grads`, with its name, in alphabetical order. Tables
    /// are among them, whose gradients of rows `grads.get` does not show.
    ///
    /// They are the norms that a step with these gradients measures before it clips: after the division by the loss
    /// scale, with the contributions to each row summed. [`report`](Self::report) has their total where the optimizer
    /// measures them, and [`Table::gradient`](crate::Table::gradient) the rows themselves. This waits for the devices
    /// that gradients are on, and changes nothing.
    ///
    /// ```
    /// use candle_adamax::{Adamax, NormType, ParamsAdamax, Table};
    /// use candle_core::{DType, Device, Tensor, Var};
    ///
    /// let (weight, bias) = (Var::zeros((1000, 2), DType::F32, &Device::Cpu)?, Var::zeros(2, DType::F32, &Device::Cpu)?);
    /// let vars = [("weight", weight.clone()), ("bias", bias.clone())];
    /// let optimizer = Adamax::from_named(vars, ParamsAdamax::default())?;
    ///
    /// let rows = Table::new(&weight)?.lookup(&Tensor::new(&[7u32, 7], &Device::Cpu)?)?;
    /// let grads = rows.broadcast_add(&bias)?.sum_all()?.backward()?;
    /// let norms = optimizer.gradient_norms(&grads, NormType::Inf)?;
    /// assert_eq!(norms, [("bias".to_owned(), 2.0), ("weight".to_owned(), 2.0)]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A gradient that a step would refuse: of the wrong shape, dtype or device, or of a lookup that is not known any
    /// more. No gradient at all is none: the list is empty.
    pub fn gradient_norms(&self, grads: &GradStore, norm: NormType) -> Result<Vec<(String, f64)>> {
        let mut lookups = self.lookups(grads)?;
        let found = |param: &super::Param| Found {
            dense: grads.get(&param.var),
            lookups: lookups.take(param.var.id()),
            ..Found::default()
        };
        let norms = || {
            let mut collected = collect(&self.vars, &self.storages, found)?;
            collected.sum_rows(&self.vars)?;
            let gradients = Gradients::OfThisCall(&collected);
            let unscale = self.unscale().abs();
            let measured = Context::default().measure(&gradients.sources(&self.vars)?, norm)?;
            let names = gradients.indices(&self.vars).map(|index| self.vars[index].name.clone());
            Ok(names.zip(measured.into_iter().map(|norm| norm.times(unscale).to_f64())).collect())
        };
        norms().map_err(|error| self.own(error))
    }
}
