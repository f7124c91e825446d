use super::*;
use crate::plain::{PlainBackend, Without};
use moellon_model::synthetic::preset;
use moellon_ops::reference::ReferenceBackend;

fn tiny() -> ModelConfig {
    let mut config = preset("glm-5.2-77:layers=1,vocab=128").expect("preset is known");
    config.hidden_size = 128;
    config.moe.num_experts = 6;
    config.moe.num_experts_per_tok = 2;
    config.moe.moe_intermediate_size = 64;
    let Attention::Mla(mla) = &mut config.attention else { panic!("GLM has latent attention") };
    (mla.num_heads, mla.kv_lora_rank, mla.v_head_dim) = (2, 64, 64);
    (mla.qk_nope_head_dim, mla.qk_rope_head_dim) = (64, 64);
    config
}

fn ladder(plain: Option<&mut dyn Backend>, format: &str) -> LadderReport {
    let (mut best, mut reference) = (ReferenceBackend::new(), ReferenceBackend::new());
    let measure_read = || ReadBandwidth { gb_per_s: 10.0, steal_percent: 0.0 };
    let mut ladder = Ladder {
        config: &tiny(),
        format: FormatPlan::parse(format).expect("format is known"),
        best: &mut best,
        // Not as it is: its lifetime is longer than those of the others.
        plain: plain.map(|plain| plain as &mut dyn Backend),
        reference: &mut reference,
        measure_read: &measure_read,
        progress: &mut |_| {},
    };
    let plan = LadderPlan { rows: vec![1, 3], prompts: vec![9], context: 70, passes: 1, seed: 5 };
    ladder.run(&plan, "tiny", format).expect("the ladder runs")
}

/// Rungs by operation, rows and implementation.
fn names(report: &LadderReport) -> Vec<(String, usize, String)> {
    report.rungs.iter().map(|r| (r.operation.clone(), r.rows, r.implementation.clone())).collect()
}

#[test]
fn every_operation_has_a_reference_and_a_check() {
    let report = ladder(None, "affine-4");
    let names = names(&report);
    for operation in
        ["expert gate and up", "expert down", "experts, with their choice", "dense product", "latent attention", "head"]
    {
        for rows in [1, 3] {
            for implementation in ["reference", "plain"] {
                let rung = (operation.to_owned(), rows, implementation.to_owned());
                assert_eq!(names.iter().filter(|name| **name == rung).count(), 1, "{rung:?}");
            }
        }
    }
    let prompts: Vec<&Rung> = report.rungs.iter().filter(|r| r.rows == 9).collect();
    assert_eq!(prompts.len(), 2);
    for rung in &report.rungs {
        let expected = match (rung.rows, rung.implementation.as_str()) {
            (9, _) => "the bits of fewer rows",
            (_, "plain") => "0.00 of the tolerance",
            _ => "",
        };
        assert_eq!(rung.check, expected, "{} with {} rows", rung.operation, rung.rows);
        assert!(rung.microseconds > 0.0 && rung.bytes > 0);
    }
}

#[test]
fn bytes_are_those_of_distinct_experts() {
    let report = ladder(None, "affine-4");
    let of = |operation: &str, rows: usize| {
        let rung = report.rungs.iter().find(|r| r.operation == operation && r.rows == rows);
        let rung = rung.expect("every operation is there");
        (rung.bytes, rung.distinct_experts.expect("it has experts"))
    };
    // A group of 64 codes of four bits has two bf16 numbers.
    let expert = (2 * 64 * 128) as f64 * (4.0 + 32.0 / 64.0) / 8.0;
    let (bytes, distinct) = of("expert gate and up", 1);
    assert_eq!(distinct, 2.0);
    assert_eq!(bytes as f64, 2.0 * expert + 4.0 * (128.0 + 2.0 * 64.0));
    let (_, distinct) = of("expert gate and up", 3);
    assert!(distinct > 2.0 && distinct <= 6.0, "{distinct}");
    // Choices are independent: nine rows of two of six reach nearly all.
    let (_, distinct) = of("experts, with their choice", 9);
    assert!(distinct > 5.0, "{distinct}");
}

#[test]
fn a_wrong_weight_is_seen() {
    // Other weights than the reference's: the check must say so.
    let config = tiny();
    let format = FormatPlan::parse("affine-4").expect("format is known");
    let plan = LadderPlan { rows: vec![2], prompts: vec![], context: 70, passes: 1, seed: 5 };
    let (mut one, mut other) = (ReferenceBackend::new(), ReferenceBackend::new());
    let mut right = Bed::new(&config, format, &plan, false);
    let mut wrong = Bed::new(&config, format, &LadderPlan { seed: 6, ..plan.clone() }, false);
    let expected = right.turns(Operation::Dense, 2, &mut one).expect("turns are made");
    let same = right.turns(Operation::Dense, 2, &mut one).expect("turns are made");
    let found = wrong.turns(Operation::Dense, 2, &mut other).expect("turns are made");
    let check = check_turn(&found[0], &mut other, &expected[0], &mut one).expect("both run");
    let share: f32 = check.trim_end_matches(" of the tolerance").parse().expect("a number");
    assert!(share > 100.0, "{check}");
    let run = |backend: &mut ReferenceBackend| {
        run_turn(&same[0], backend).expect("it runs");
        read_f32(same[0].out(), backend).expect("it is read")
    };
    assert_eq!(same_bits(&run(&mut one), &run(&mut one)), "same bits");
    assert!(same_bits(&[1.0, 2.0], &[1.0, 2.5]).starts_with("differs by 2.0e-1"));
}

#[test]
fn experts_one_by_one_stand_below_the_best() {
    let mut plain = PlainBackend::new(Box::new(ReferenceBackend::new()), Without { fused_experts: true });
    let report = ladder(Some(&mut plain), "bf16");
    let best: Vec<&Rung> = report.rungs.iter().filter(|r| r.implementation == "best").collect();
    assert_eq!(best.len(), 14);
    // Weighted sums on the host are rounded after each expert.
    for rung in best {
        assert!(rung.check == "same bits" || rung.operation.contains("expert"), "{}: {}", rung.operation, rung.check);
    }
}

#[test]
fn kernels_are_added_up_by_name() {
    let time = |name: &str, seconds| KernelTime { name: name.to_owned(), seconds };
    let kernels = [time("rms_norm", 9.0), time("up", 4e-6), time("down", 1e-6), time("up", 6e-6), time("down", 3e-6)];
    let found = by_name(&kernels, 2);
    assert_eq!(found[0], LadderKernel { name: "up".to_owned(), launches: 1.0, microseconds: 5.0 });
    assert_eq!(found[1].name, "down");
    assert!((found[1].microseconds - 2.0).abs() < 1e-9);
}
