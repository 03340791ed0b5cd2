//! Attention over two segments of keys.

mod common;

use common::{device, rows};
use gpt2_burn::burn::nn::DropoutConfig;
use gpt2_burn::burn::tensor::{Tensor, TensorData};
use gpt2_burn::model::attention::{Segment, attend};
use gpt2_burn::sampling::{Purpose, uniform};

#[test]
fn two_segments_attend_as_one() {
    let (batch, heads, time, shared, own, width) = (2, 3, 4, 5, 7, 8);
    let random = |seed: u64, shape: [usize; 4]| {
        let value = |index| uniform(seed, 0, index, Purpose::Token) as f32;
        let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(value).collect();
        Tensor::<4>::from_data(TensorData::new(values, shape), &device())
    };
    let query = random(1, [batch, heads, time, width]);
    let common = Segment { keys: random(2, [1, heads, shared, width]), values: random(3, [1, heads, shared, width]) };
    let each = Segment { keys: random(4, [batch, heads, own, width]), values: random(5, [batch, heads, own, width]) };
    let hidden = Tensor::<2>::ones([time, own], &device()).triu(4).greater_elem(0.5).reshape([1, 1, time, own]);
    let no_dropout = DropoutConfig::new(0.0).init();
    let two = attend(query.clone(), Some(common.clone()), each.clone(), Some(hidden.clone()), &no_dropout);

    let join =
        |common: Tensor<4>, each: Tensor<4>| Tensor::cat(vec![common.expand([batch, heads, shared, width]), each], 2);
    let one = Segment { keys: join(common.keys, each.keys), values: join(common.values, each.values) };
    let seen = Tensor::<4>::zeros([1, 1, time, shared], &device()).greater_elem(0.5);
    let one = attend(query, None, one, Some(Tensor::cat(vec![seen, hidden], 3)), &no_dropout);
    for (two, one) in rows(two).iter().flatten().zip(rows(one).iter().flatten()) {
        assert!((two - one).abs() < 1e-6);
    }
}
