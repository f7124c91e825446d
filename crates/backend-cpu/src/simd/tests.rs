//! Every level against the portable one, bit for bit, and the functions of `math` against f64.

use super::*;
use crate::simd::{math, portable::Portable};
use moellon_tensor::rng::SplitMix64;

/// Inputs and outputs of one call of every operation.
struct AllOperations {
    a: [f32; 16],
    b: [f32; 16],
    c: [f32; 16],
    i: [i32; 16],
    k: [i32; 16],
    /// 64 bytes as codes and 64 as signed activations within ±127.
    codes: [u8; 64],
    x: [u8; 64],
    out: std::cell::RefCell<Vec<(&'static str, Vec<u32>)>>,
}

impl Kernel for AllOperations {
    type Args = Self;

    const BYTE_DOTS: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Self) {
        // SAFETY: all arrays are 64 bytes.
        unsafe {
            let (a, b, c) = (s.load(args.a.as_ptr()), s.load(args.b.as_ptr()), s.load(args.c.as_ptr()));
            let (i, k) = (s.load_i(args.i.as_ptr().cast()), s.load_i(args.k.as_ptr().cast()));
            let (codes, x) = (s.load_i(args.codes.as_ptr()), s.load_i(args.x.as_ptr()));
            let mut out = args.out.borrow_mut();
            macro_rules! float {
                ($name:literal, $value:expr) => {{
                    let mut lanes = [0.0f32; 16];
                    s.store($value, lanes.as_mut_ptr());
                    out.push(($name, lanes.iter().map(|x| x.to_bits()).collect()));
                }};
            }
            macro_rules! int {
                ($name:literal, $value:expr) => {{
                    let mut lanes = [0.0f32; 16];
                    s.store(s.cast_to_f($value), lanes.as_mut_ptr());
                    out.push(($name, lanes.iter().map(|x| x.to_bits()).collect()));
                }};
            }
            float!("splat", s.splat(args.a[3]));
            float!("add", s.add(a, b));
            float!("sub", s.sub(a, b));
            float!("mul", s.mul(a, b));
            float!("div", s.div(a, b));
            float!("mul_add", s.mul_add(a, b, c));
            float!("max", s.max(a, b));
            float!("min", s.min(a, b));
            float!("sum", s.splat(s.sum(a)));
            for (sum, x) in s.sum_4([a, b, c, s.mul(a, b)]).into_iter().zip([a, b, c, s.mul(a, b)]) {
                float!("sum_4", s.splat(sum));
                float!("sum", s.splat(s.sum(x)));
            }
            float!("max_lane", s.splat(s.max_lane(a)));
            for largest in s.max_lane_4([a, b, c, s.mul(a, b)]) {
                float!("max_lane_4", s.splat(largest));
            }
            for sum in s.sum_i_4([i, k, s.add_i(i, k), s.and(i, k)]) {
                int!("sum_i_4", s.splat_i(sum));
            }
            float!("abs", math::abs(s, a));
            float!("exp", math::exp(s, a));
            float!("sigmoid", math::sigmoid(s, a));
            float!("load_partial", s.load_partial(args.a.as_ptr(), 11));
            float!("to_f", s.to_f(i));
            float!("load_f16", s.load_f16(args.codes.as_ptr()));
            int!("to_i", s.to_i(a));
            int!("splat_i", s.splat_i(args.i[5]));
            int!("splat_4_bytes", s.splat_4_bytes(args.codes.as_ptr().add(7)));
            int!("load_u8", s.load_u8(args.codes.as_ptr()));
            int!("load_u16", s.load_u16(args.codes.as_ptr()));
            int!("and", s.and(i, k));
            int!("or", s.or(i, k));
            int!("shl", s.shl(i, 5));
            int!("shl 0", s.shl(i, 0));
            int!("shr", s.shr(i, 9));
            int!("sar", s.sar(i, 4));
            int!("add_i", s.add_i(i, k));
            int!("sub_i", s.sub_i(i, k));
            int!("greater", s.greater(i, k));
            int!("sum_i", s.splat_i(s.sum_i(i)));
            int!(
                "look_up",
                s.look_up(s.load_table(&core::array::from_fn(|n| (n * n) as u8)), s.and(codes, s.splat_i(0x0f0f_0f0f)))
            );
            int!("dot4_u7", s.dot4_u7(i, s.and(codes, s.splat_i(0x7f7f_7f7f)), x));
            int!("dot4_u8", s.dot4_u8(i, codes, x));
            // As many steps with as large codes as 16 bits hold.
            for (steps, mask) in [(8, 0x0f0f_0f0f), (4, 0x1f1f_1f1f), (2, 0x3f3f_3f3f)] {
                let mut pairs = s.open_pairs(i);
                for _ in 0..steps {
                    pairs = s.dot4_pairs(pairs, s.and(codes, s.splat_i(mask)), x);
                }
                int!("dot4_pairs", s.close_pairs(i, pairs));
            }
            let mut low = [0u8; 16];
            s.store_low_bytes(i, low.as_mut_ptr());
            out.push(("store_low_bytes", low.iter().map(|b| u32::from(*b)).collect()));
            let mut partial = [7.0f32; 16];
            s.store_partial(a, partial.as_mut_ptr(), 5);
            out.push(("store_partial", partial.iter().map(|x| x.to_bits()).collect()));
            s.prefetch(std::ptr::null());
        }
    }
}

#[test]
fn every_level_gives_the_bits_of_the_portable_one() {
    let mut rng = SplitMix64::new(3);
    for round in 0..500 {
        let mut floats = || -> [f32; 16] { core::array::from_fn(|_| rng.next_normal() * [1.0, 30.0, 1e-3][round % 3]) };
        let (a, b, c) = (floats(), floats(), floats());
        let mut ints = || -> [i32; 16] { core::array::from_fn(|_| rng.next_u64() as i32) };
        let (i, k) = (ints(), ints());
        let codes: [u8; 64] = core::array::from_fn(|_| rng.next_u64() as u8);
        let x: [u8; 64] = core::array::from_fn(|_| (rng.below(255) as i32 - 127) as u8);
        // The first round has the extremes of the byte products.
        let (codes, x) = if round == 0 { ([255; 64], [129; 64]) } else { (codes, x) };
        let args = AllOperations { a, b, c, i, k, codes, x, out: Default::default() };
        // SAFETY: the arguments are whole.
        unsafe { AllOperations::run(Portable, &args) };
        let expected = args.out.take();
        for level in CpuLevel::available() {
            // SAFETY: as above.
            unsafe { Level::new(level).unwrap().call::<AllOperations>(&args) };
            for ((name, actual), (_, expected)) in args.out.take().iter().zip(&expected) {
                // The payload of a NaN is free.
                let same = actual.iter().zip(expected).all(|(a, e)| {
                    a == e || (f32::from_bits(*a).is_nan() && f32::from_bits(*e).is_nan() && *name == "load_f16")
                });
                assert!(same, "{name} at {level}: {actual:x?}, expected {expected:x?}");
            }
        }
    }
}

/// `out[i] = f(x[i])` for 16 numbers.
struct Functions {
    x: [f32; 16],
    out: std::cell::Cell<[[f32; 16]; 2]>,
}

impl Kernel for Functions {
    type Args = Self;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Self) {
        // SAFETY: arrays of 16.
        unsafe {
            let x = s.load(args.x.as_ptr());
            let mut out = [[0.0; 16]; 2];
            s.store(math::exp(s, x), out[0].as_mut_ptr());
            s.store(math::sigmoid(s, x), out[1].as_mut_ptr());
            args.out.set(out);
        }
    }
}

#[test]
fn exp_and_sigmoid_are_right_to_a_few_units_in_the_last_place() {
    let level = Level::new(CpuLevel::detect()).unwrap();
    let mut x = -86.9f32;
    while x < 87.9 {
        let args = Functions { x: core::array::from_fn(|i| x + i as f32 * 1e-3), out: Default::default() };
        // SAFETY: the arguments are whole.
        unsafe { level.call::<Functions>(&args) };
        let [exp, sigmoid] = args.out.get();
        for lane in 0..16 {
            let exact = f64::from(args.x[lane]).exp();
            assert!(
                (f64::from(exp[lane]) / exact - 1.0).abs() < 2.0 * f64::from(f32::EPSILON),
                "exp({})",
                args.x[lane]
            );
            let exact = 1.0 / (1.0 + (-f64::from(args.x[lane])).exp());
            assert!(
                (f64::from(sigmoid[lane]) / exact - 1.0).abs() < 4.0 * f64::from(f32::EPSILON),
                "sigmoid({})",
                args.x[lane]
            );
        }
        x += 16e-3;
    }
    let args = Functions { x: [f32::NEG_INFINITY; 16], out: Default::default() };
    // SAFETY: the arguments are whole.
    unsafe { level.call::<Functions>(&args) };
    assert!(args.out.get()[0][0] < 1e-37 && args.out.get()[1][0] < 1e-37);
}
