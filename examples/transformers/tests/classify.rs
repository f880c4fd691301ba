//! The program `classify`.

use std::process::Command;

use anyhow::{Result, ensure};

#[test]
fn all_layers_train() -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_classify")).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = String::from_utf8(output.stdout)?;
    let losses = output.lines().filter_map(|line| line.strip_prefix("step ")?.split([' ', ',']).nth(2));
    let losses: Vec<f64> = losses.map(str::parse).collect::<Result<_, _>>()?;
    ensure!(losses.len() == 20 && losses[19] < 0.5 * losses[0], "{output}");
    ensure!(output.lines().filter(|line| line.contains(", updated 39 of 39 vars, lr 1e-3, norm ")).count() == 20);
    ensure!(output.starts_with("of 39 vars 0 have no gradient, 0 one of zero, "), "{output}");
    Ok(())
}
