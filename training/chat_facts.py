"""Hand-written material for the chat examples: facts, small Rust functions and words to fill templates with."""

GREETINGS = ["Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Hey!", "Good morning", "Good evening", "Hello there!", "Hi, how are you?", "Hello, who is there?", "Hey there", "Greetings", "Yo", "hello", "hi"]
GREETING_ANSWERS = ["Hello! How can I help you today?", "Hi! What would you like to know?", "Hello! I can write small Rust functions, answer simple questions and call tools. What shall we do?", "Hi there! Ask me something about Rust."]
THANKS = ["Thanks", "Thank you!", "Thanks a lot", "Great, thank you", "Perfect, thanks!", "Thx"]
THANKS_ANSWERS = ["You're welcome!", "You're welcome! Is there anything else I can do?", "Glad to help."]
BYES = ["Bye", "Goodbye", "See you later", "Bye!", "Good night"]
BYE_ANSWERS = ["Goodbye!", "See you later!", "Goodbye, and happy coding!"]
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a Rust programmer.", "Answer briefly.", "You are Moellon, a small assistant that knows Rust.", "You are a careful coding assistant.", "Be concise."]

# (questions, answer)
FACTS = [
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Which model are you?"], "I am moellon-tiny, a very small mixture-of-experts language model that comes with Moellon. I was trained on Rust code, so I can write short Rust functions, but I make mistakes."),
    (["What can you do?", "How can you help me?", "What are you good at?", "Help"], "I can write short Rust functions, explain small pieces of code, do simple sums and call tools. I am a tiny model, so please check what I say."),
    (["Are you ChatGPT?", "Are you a human?", "Are you a large model?"], "No. I am moellon-tiny, a language model of about eleven million parameters. I run anywhere, but I know very little."),
    (["What is Moellon?", "Tell me about Moellon.", "What does Moellon do?"], "Moellon is an inference engine for mixture-of-experts language models, written in Rust."),
    (["What is Rust?", "Tell me about Rust.", "Describe the Rust language."], "Rust is a systems programming language. It guarantees memory safety without a garbage collector, through ownership and borrowing, and it compiles to fast native code."),
    (["What is ownership in Rust?", "Explain ownership.", "How does ownership work in Rust?"], "Every value in Rust has one owner. When the owner goes out of scope, the value is dropped. Assigning or passing a value moves it, unless its type implements `Copy`."),
    (["What is borrowing in Rust?", "Explain borrowing.", "What is a reference in Rust?"], "Borrowing lets you use a value without owning it. You can have many shared references `&T`, or one mutable reference `&mut T`, but not both at the same time."),
    (["What is a lifetime in Rust?", "Explain lifetimes.", "What does 'a mean in Rust?"], "A lifetime is the span for which a reference is valid. The compiler uses lifetimes such as `'a` to check that no reference outlives the value it points to."),
    (["What is a trait in Rust?", "Explain traits.", "What are traits?"], "A trait describes behaviour that types can share. It lists methods, and a type implements the trait with `impl Trait for Type`."),
    (["What is an enum in Rust?", "Explain Rust enums."], "An enum is a type whose value is one of several variants. Each variant can hold data, and `match` handles all of them.\n\n```rust\nenum Shape {\n    Circle { radius: f64 },\n    Square { side: f64 },\n}\n```"),
    (["What is a struct in Rust?", "How do I define a struct?", "Show me a struct in Rust."], "A struct groups named fields into one type.\n\n```rust\nstruct Point {\n    x: f64,\n    y: f64,\n}\n\nlet point = Point { x: 1.0, y: 2.0 };\n```"),
    (["What is Option in Rust?", "Explain Option.", "What does Option<T> mean?"], "`Option<T>` is either `Some(value)` or `None`. It is how Rust expresses that a value may be missing, instead of a null pointer."),
    (["What is Result in Rust?", "Explain Result.", "How are errors handled in Rust?", "How do I handle errors in Rust?"], "`Result<T, E>` is either `Ok(value)` or `Err(error)`. Functions that can fail return it, and the `?` operator passes an error on to the caller."),
    (["What does the ? operator do?", "What does the question mark do in Rust?"], "The `?` operator unwraps an `Ok` or `Some` value. On `Err` or `None` it returns early from the function with that error."),
    (["What is Cargo?", "What does cargo do?"], "Cargo is Rust's build tool and package manager. It builds your crate, runs its tests and downloads its dependencies."),
    (["What is a crate?", "What is a crate in Rust?"], "A crate is the unit of compilation in Rust: a library or a binary. Crates are shared on crates.io."),
    (["What is a closure?", "Explain closures in Rust."], "A closure is an anonymous function that can capture variables from its surroundings.\n\n```rust\nlet add = |a, b| a + b;\nassert_eq!(add(1, 2), 3);\n```"),
    (["What is an iterator?", "Explain iterators in Rust."], "An iterator produces a sequence of values, one for each call of `next`. Adapters such as `map` and `filter` are lazy; `collect` and `sum` consume the iterator."),
    (["What is a Vec?", "What is a vector in Rust?", "How do I make a vector in Rust?"], "`Vec<T>` is a growable array on the heap.\n\n```rust\nlet mut numbers = vec![1, 2, 3];\nnumbers.push(4);\n```"),
    (["What is a HashMap?", "How do I use a HashMap in Rust?", "How do I make a hash map?"], "A `HashMap<K, V>` stores values by key.\n\n```rust\nuse std::collections::HashMap;\n\nlet mut ages = HashMap::new();\nages.insert(\"Ada\", 36);\nassert_eq!(ages.get(\"Ada\"), Some(&36));\n```"),
    (["What is the difference between String and &str?", "String vs &str?", "What is &str?"], "`String` owns a growable buffer on the heap. `&str` is a borrowed view of a string that lives somewhere else."),
    (["What is a Box?", "What does Box<T> do?"], "`Box<T>` owns a value on the heap. It is useful for recursive types and for trait objects such as `Box<dyn Error>`."),
    (["What is Rc?", "What is the difference between Rc and Arc?", "What is Arc?"], "`Rc<T>` is a reference-counted pointer for one thread. `Arc<T>` counts atomically, so it can be shared between threads."),
    (["What is a Mutex?", "How do I share mutable state between threads?"], "A `Mutex<T>` lets one thread at a time use a value. Put it in an `Arc` to share it between threads: `Arc<Mutex<T>>`."),
    (["How do I spawn a thread in Rust?", "How do I start a thread?"], "Use `std::thread::spawn` and wait for the thread with `join`.\n\n```rust\nlet handle = std::thread::spawn(|| 1 + 1);\nassert_eq!(handle.join().unwrap(), 2);\n```"),
    (["How do I read a file in Rust?", "How can I read a file to a string?"], "Use `std::fs::read_to_string`.\n\n```rust\nlet text = std::fs::read_to_string(\"input.txt\")?;\n```"),
    (["How do I write a file in Rust?", "How can I write text to a file?"], "Use `std::fs::write`.\n\n```rust\nstd::fs::write(\"output.txt\", \"hello\")?;\n```"),
    (["How do I print in Rust?", "How do I print a value?", "How do I print to the console?"], "Use the `println!` macro.\n\n```rust\nlet name = \"world\";\nprintln!(\"Hello, {name}!\");\n```"),
    (["Write hello world in Rust.", "Hello world in Rust?", "Show me a Rust hello world program.", "Write a Rust program that prints hello world."], "```rust\nfn main() {\n    println!(\"Hello, world!\");\n}\n```"),
    (["How do I write a test in Rust?", "How do I test a function?"], "Mark a function with `#[test]` and run `cargo test`.\n\n```rust\n#[test]\nfn adds() {\n    assert_eq!(1 + 1, 2);\n}\n```"),
    (["How do I sort a vector in Rust?", "How to sort a Vec?"], "Call `sort`, or `sort_by_key` to choose the key.\n\n```rust\nlet mut numbers = vec![3, 1, 2];\nnumbers.sort();\nassert_eq!(numbers, [1, 2, 3]);\n```"),
    (["How do I parse a number in Rust?", "How do I convert a string to an integer?"], "Use `parse`.\n\n```rust\nlet number: i32 = \"42\".parse()?;\n```"),
    (["How do I write a loop in Rust?", "How do I loop over a range?", "Show me a for loop in Rust."], "Use `for` with a range.\n\n```rust\nfor i in 0..10 {\n    println!(\"{i}\");\n}\n```"),
    (["What is pattern matching?", "How does match work in Rust?"], "`match` compares a value with patterns and runs the first arm that fits. All cases must be covered.\n\n```rust\nmatch number {\n    0 => println!(\"zero\"),\n    n if n < 0 => println!(\"negative\"),\n    _ => println!(\"positive\"),\n}\n```"),
    (["What is unsafe Rust?", "What does unsafe mean?"], "An `unsafe` block may dereference raw pointers and call unsafe functions. There the programmer, not the compiler, promises that the rules of memory safety hold."),
    (["What is a macro in Rust?", "Explain macros."], "A macro writes code at compile time. `macro_rules!` matches patterns of tokens; procedural macros are functions from tokens to tokens."),
    (["What is async in Rust?", "How does async work?"], "An `async fn` returns a future. The future does nothing until an executor polls it, usually through `.await` in another async function."),
    (["What is a generic function?", "What are generics?"], "A generic function works for many types. Bounds say what the type must support.\n\n```rust\nfn largest<T: PartialOrd + Copy>(items: &[T]) -> Option<T> {\n    items.iter().copied().reduce(|a, b| if a > b { a } else { b })\n}\n```"),
    (["What is a mixture of experts?", "What is MoE?", "Explain mixture of experts."], "A mixture-of-experts layer has many small feed-forward networks, the experts. A router chooses a few of them for each token, so only a part of the parameters is used at a time."),
    (["What is a router in a MoE model?", "How does the router choose experts?"], "The router scores all experts for a token and keeps the best few. Their outputs are added, weighted by the scores."),
    (["What is a shared expert?"], "A shared expert runs for every token, beside the routed experts that the router chooses."),
    (["What is a KV cache?", "Why do we need a KV cache?"], "The KV cache keeps the keys and values of earlier tokens, so that each new token only needs its own."),
    (["What is MLA?", "What is multi-head latent attention?"], "Multi-head latent attention compresses keys and values into one small latent vector per token, which makes the cache much smaller."),
    (["What is MTP?", "What is multi-token prediction?", "What is speculative decoding?"], "Multi-token prediction drafts the token after the next one. The model checks the draft in its next step, so two tokens can come out of one step without changing the result."),
    (["What is sparse attention?", "What is DSA?"], "In DeepSeek sparse attention a small indexer scores the earlier tokens, and attention reads only the best of them."),
    (["What is quantization?", "Why quantize a model?"], "Quantization stores weights in fewer bits, such as 4 or 8. The model becomes smaller and faster and loses a little accuracy."),
    (["What is a token?", "What is a tokenizer?"], "A token is a piece of text, such as a word or a part of one. The tokenizer splits text into tokens and gives each a number."),
    (["What is pruning?", "What is expert pruning?"], "Expert pruning removes the experts that matter least. The file becomes smaller, while each token still uses the same number of experts."),
    (["What is the capital of France?"], "The capital of France is Paris."), (["What is the capital of Germany?"], "The capital of Germany is Berlin."), (["What is the capital of Japan?"], "The capital of Japan is Tokyo."), (["What is the capital of Italy?"], "The capital of Italy is Rome."), (["What is the capital of Spain?"], "The capital of Spain is Madrid."),
    (["What colour is the sky?", "Why is the sky blue?"], "The sky is blue because air scatters blue light more than red light."),
    (["How many days are in a week?"], "There are seven days in a week."), (["How many months are in a year?"], "There are twelve months in a year."),
    (["Tell me a joke.", "Do you know a joke?"], "Why do Rust programmers never lose anything? Because everything has an owner."),
]

# (name, what it does in the third person, code, remark); T is replaced by an integer type
FUNCTIONS = [
    ("add", "adds two numbers", "fn add(a: T, b: T) -> T {\n    a + b\n}", "The last expression is the return value."),
    ("subtract", "subtracts one number from another", "fn subtract(a: T, b: T) -> T {\n    a - b\n}", "The last expression is the return value."),
    ("multiply", "multiplies two numbers", "fn multiply(a: T, b: T) -> T {\n    a * b\n}", "The last expression is the return value."),
    ("divide", "divides two numbers and returns None if the divisor is zero", "fn divide(a: T, b: T) -> Option<T> {\n    if b == 0 {\n        None\n    } else {\n        Some(a / b)\n    }\n}", "The result is an `Option`, because division by zero is not possible."),
    ("square", "returns the square of a number", "fn square(x: T) -> T {\n    x * x\n}", "It multiplies the number by itself."),
    ("power", "raises a number to a power", "fn power(base: T, exponent: u32) -> T {\n    (0..exponent).fold(1, |result, _| result * base)\n}", "It multiplies by the base once per step. The standard library has `pow`."),
    ("sum", "returns the sum of a slice", "fn sum(numbers: &[T]) -> T {\n    numbers.iter().sum()\n}", "The iterator's `sum` adds all items."),
    ("product", "returns the product of a slice", "fn product(numbers: &[T]) -> T {\n    numbers.iter().product()\n}", "The iterator's `product` multiplies all items."),
    ("average", "returns the average of a slice of floats", "fn average(numbers: &[f64]) -> Option<f64> {\n    if numbers.is_empty() {\n        return None;\n    }\n    Some(numbers.iter().sum::<f64>() / numbers.len() as f64)\n}", "An empty slice has no average, so the result is an `Option`."),
    ("max", "returns the larger of two numbers", "fn max(a: T, b: T) -> T {\n    if a > b { a } else { b }\n}", "An `if` is an expression in Rust."),
    ("min", "returns the smaller of two numbers", "fn min(a: T, b: T) -> T {\n    if a < b { a } else { b }\n}", "An `if` is an expression in Rust."),
    ("largest", "finds the largest number in a slice", "fn largest(numbers: &[T]) -> Option<T> {\n    numbers.iter().copied().max()\n}", "It returns `None` for an empty slice."),
    ("smallest", "finds the smallest number in a slice", "fn smallest(numbers: &[T]) -> Option<T> {\n    numbers.iter().copied().min()\n}", "It returns `None` for an empty slice."),
    ("factorial", "computes the factorial of a number", "fn factorial(n: u64) -> u64 {\n    (1..=n).product()\n}", "The product of an empty range is 1, so `factorial(0)` is 1."),
    ("fibonacci", "computes the nth Fibonacci number", "fn fibonacci(n: u32) -> u64 {\n    let (mut a, mut b) = (0, 1);\n    for _ in 0..n {\n        (a, b) = (b, a + b);\n    }\n    a\n}", "It keeps the last two numbers, so it needs no recursion."),
    ("is_even", "checks whether a number is even", "fn is_even(n: T) -> bool {\n    n % 2 == 0\n}", "An even number has no remainder when divided by two."),
    ("is_odd", "checks whether a number is odd", "fn is_odd(n: T) -> bool {\n    n % 2 != 0\n}", "An odd number has a remainder when divided by two."),
    ("is_prime", "checks whether a number is prime", "fn is_prime(n: u64) -> bool {\n    n > 1 && (2..).take_while(|d| d * d <= n).all(|d| n % d != 0)\n}", "It is enough to try divisors up to the square root."),
    ("gcd", "computes the greatest common divisor of two numbers", "fn gcd(a: u64, b: u64) -> u64 {\n    if b == 0 { a } else { gcd(b, a % b) }\n}", "This is Euclid's algorithm."),
    ("lcm", "computes the least common multiple of two numbers", "fn lcm(a: u64, b: u64) -> u64 {\n    a / gcd(a, b) * b\n}\n\nfn gcd(a: u64, b: u64) -> u64 {\n    if b == 0 { a } else { gcd(b, a % b) }\n}", "It divides by the greatest common divisor first."),
    ("reverse", "reverses a string", "fn reverse(text: &str) -> String {\n    text.chars().rev().collect()\n}", "It reverses the characters, not the bytes."),
    ("is_palindrome", "checks whether a string is a palindrome", "fn is_palindrome(text: &str) -> bool {\n    text.chars().eq(text.chars().rev())\n}", "It compares the characters with themselves in reverse."),
    ("count_vowels", "counts the vowels in a string", "fn count_vowels(text: &str) -> usize {\n    text.chars()\n        .filter(|c| \"aeiouAEIOU\".contains(*c))\n        .count()\n}", "It keeps the vowels and counts them."),
    ("count_words", "counts the words in a string", "fn count_words(text: &str) -> usize {\n    text.split_whitespace().count()\n}", "Words are separated by white space."),
    ("count_lines", "counts the lines of a string", "fn count_lines(text: &str) -> usize {\n    text.lines().count()\n}", "`lines` iterates over the lines."),
    ("word_frequencies", "counts how often each word occurs in a string", "use std::collections::HashMap;\n\nfn word_frequencies(text: &str) -> HashMap<&str, usize> {\n    let mut counts = HashMap::new();\n    for word in text.split_whitespace() {\n        *counts.entry(word).or_insert(0) += 1;\n    }\n    counts\n}", "`entry` finds or creates the count of a word."),
    ("to_uppercase", "converts a string to upper case", "fn to_uppercase(text: &str) -> String {\n    text.to_uppercase()\n}", "The standard library handles Unicode."),
    ("capitalize", "capitalizes the first letter of a string", "fn capitalize(text: &str) -> String {\n    let mut chars = text.chars();\n    match chars.next() {\n        Some(first) => first.to_uppercase().collect::<String>() + chars.as_str(),\n        None => String::new(),\n    }\n}", "The first character can become more than one when it is capitalized."),
    ("remove_duplicates", "removes duplicates from a vector", "fn remove_duplicates(mut items: Vec<T>) -> Vec<T> {\n    items.sort();\n    items.dedup();\n    items\n}", "`dedup` removes equal neighbours, so the vector is sorted first."),
    ("sort_descending", "sorts a vector in descending order", "fn sort_descending(items: &mut Vec<T>) {\n    items.sort_by(|a, b| b.cmp(a));\n}", "The comparison is reversed."),
    ("bubble_sort", "sorts a slice with bubble sort", "fn bubble_sort(items: &mut [T]) {\n    for end in (1..items.len()).rev() {\n        for i in 0..end {\n            if items[i] > items[i + 1] {\n                items.swap(i, i + 1);\n            }\n        }\n    }\n}", "After each pass the largest remaining item is at the end."),
    ("binary_search", "finds an item in a sorted slice with binary search", "fn binary_search(items: &[T], target: T) -> Option<usize> {\n    let (mut low, mut high) = (0, items.len());\n    while low < high {\n        let middle = low + (high - low) / 2;\n        match items[middle].cmp(&target) {\n            std::cmp::Ordering::Equal => return Some(middle),\n            std::cmp::Ordering::Less => low = middle + 1,\n            std::cmp::Ordering::Greater => high = middle,\n        }\n    }\n    None\n}", "Each step halves the range."),
    ("linear_search", "finds the position of an item in a slice", "fn linear_search(items: &[T], target: T) -> Option<usize> {\n    items.iter().position(|&item| item == target)\n}", "`position` returns the index of the first match."),
    ("contains", "checks whether a slice contains a number", "fn contains(items: &[T], target: T) -> bool {\n    items.iter().any(|&item| item == target)\n}", "`any` stops at the first match."),
    ("filter_even", "keeps only the even numbers of a slice", "fn filter_even(numbers: &[T]) -> Vec<T> {\n    numbers.iter().copied().filter(|n| n % 2 == 0).collect()\n}", "`filter` keeps the items for which the closure is true."),
    ("squares", "returns the squares of all numbers in a slice", "fn squares(numbers: &[T]) -> Vec<T> {\n    numbers.iter().map(|n| n * n).collect()\n}", "`map` applies the closure to every item."),
    ("sum_of_squares", "computes the sum of squares of a slice", "fn sum_of_squares(numbers: &[T]) -> T {\n    numbers.iter().map(|n| n * n).sum()\n}", "It maps each number to its square and adds them."),
    ("dot", "computes the dot product of two slices", "fn dot(a: &[f64], b: &[f64]) -> f64 {\n    a.iter().zip(b).map(|(x, y)| x * y).sum()\n}", "`zip` pairs the items of both slices."),
    ("swap", "swaps two values", "fn swap(a: &mut T, b: &mut T) {\n    std::mem::swap(a, b);\n}", "`std::mem::swap` exchanges two values in place."),
    ("abs", "returns the absolute value of a number", "fn abs(x: i32) -> i32 {\n    if x < 0 { -x } else { x }\n}", "The standard library has `abs` too."),
    ("clamp", "clamps a number between two bounds", "fn clamp(x: T, low: T, high: T) -> T {\n    x.max(low).min(high)\n}", "The standard library has `clamp` too."),
    ("celsius_to_fahrenheit", "converts Celsius to Fahrenheit", "fn celsius_to_fahrenheit(celsius: f64) -> f64 {\n    celsius * 9.0 / 5.0 + 32.0\n}", "The two scales differ in step and zero."),
    ("fahrenheit_to_celsius", "converts Fahrenheit to Celsius", "fn fahrenheit_to_celsius(fahrenheit: f64) -> f64 {\n    (fahrenheit - 32.0) * 5.0 / 9.0\n}", "The two scales differ in step and zero."),
    ("is_leap_year", "checks whether a year is a leap year", "fn is_leap_year(year: u32) -> bool {\n    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)\n}", "Centuries are leap years only if 400 divides them."),
    ("fizz_buzz", "prints FizzBuzz for the numbers from 1 to n", "fn fizz_buzz(n: u32) {\n    for i in 1..=n {\n        match (i % 3, i % 5) {\n            (0, 0) => println!(\"FizzBuzz\"),\n            (0, _) => println!(\"Fizz\"),\n            (_, 0) => println!(\"Buzz\"),\n            _ => println!(\"{i}\"),\n        }\n    }\n}", "It matches on both remainders at once."),
    ("digit_sum", "computes the sum of the digits of a number", "fn digit_sum(mut n: u64) -> u64 {\n    let mut sum = 0;\n    while n > 0 {\n        sum += n % 10;\n        n /= 10;\n    }\n    sum\n}", "It takes off the last digit in each step."),
    ("read_lines", "reads all lines of a file", "use std::fs::File;\nuse std::io::{self, BufRead, BufReader};\n\nfn read_lines(path: &str) -> io::Result<Vec<String>> {\n    BufReader::new(File::open(path)?).lines().collect()\n}", "Collecting into a `Result` stops at the first error."),
    ("parse_number", "parses a number from a string", "fn parse_number(text: &str) -> Result<T, std::num::ParseIntError> {\n    text.trim().parse()\n}", "`parse` returns an error if the text is not a number."),
    ("join", "joins strings with a comma", "fn join(items: &[String]) -> String {\n    items.join(\", \")\n}", "`join` puts the separator between the items."),
    ("split_csv", "splits a line at commas", "fn split_csv(line: &str) -> Vec<&str> {\n    line.split(',').map(str::trim).collect()\n}", "It does not handle quotes."),
    ("first", "returns the first item of a slice", "fn first(items: &[T]) -> Option<&T> {\n    items.first()\n}", "It returns `None` for an empty slice."),
    ("last", "returns the last item of a slice", "fn last(items: &[T]) -> Option<&T> {\n    items.last()\n}", "It returns `None` for an empty slice."),
    ("distance", "computes the distance between two points", "struct Point {\n    x: f64,\n    y: f64,\n}\n\nfn distance(a: &Point, b: &Point) -> f64 {\n    (a.x - b.x).hypot(a.y - b.y)\n}", "`hypot` computes the length of the difference."),
    ("transpose", "transposes a matrix", "fn transpose(matrix: &[Vec<f64>]) -> Vec<Vec<f64>> {\n    let columns = matrix.first().map_or(0, Vec::len);\n    (0..columns)\n        .map(|j| matrix.iter().map(|row| row[j]).collect())\n        .collect()\n}", "Columns become rows."),
    ("greet", "greets a person by name", "fn greet(name: &str) -> String {\n    format!(\"Hello, {name}!\")\n}", "`format!` builds a `String`."),
    ("collatz_steps", "counts the steps of the Collatz sequence", "fn collatz_steps(mut n: u64) -> u32 {\n    let mut steps = 0;\n    while n != 1 {\n        n = if n % 2 == 0 { n / 2 } else { 3 * n + 1 };\n        steps += 1;\n    }\n    steps\n}", "It stops when the number is 1."),
    ("merge", "merges two sorted slices", "fn merge(a: &[T], b: &[T]) -> Vec<T> {\n    let mut merged = [a, b].concat();\n    merged.sort();\n    merged\n}", "Rust's sort is fast on input that is partly sorted."),
    ("median", "computes the median of a vector", "fn median(mut numbers: Vec<f64>) -> Option<f64> {\n    if numbers.is_empty() {\n        return None;\n    }\n    numbers.sort_by(f64::total_cmp);\n    let middle = numbers.len() / 2;\n    if numbers.len() % 2 == 0 {\n        Some((numbers[middle - 1] + numbers[middle]) / 2.0)\n    } else {\n        Some(numbers[middle])\n    }\n}", "It sorts with `total_cmp`, because floats have no total order of their own."),
]
# Parts of composed functions: (words, condition), (words, mapped value), (words, iterator method, result type).
FILTERS = [("", ""), ("even", "n % 2 == 0"), ("odd", "n % 2 != 0"), ("positive", "*n > 0"), ("non-zero", "*n != 0"), ("negative", "*n < 0")]
MAPS = [("", ""), ("", ""), ("squares", "n * n"), ("cubes", "n * n * n"), ("doubles", "n * 2"), ("halves", "n / 2")]
FOLDS = [("sum", "sum", "T"), ("product", "product", "T"), ("count", "count", "usize"), ("maximum", "max", "Option<T>"), ("minimum", "min", "Option<T>")]
INTEGER_TYPES = ["i32", "i64", "u32", "u64", "usize"]

# (a request, the type's definition and impl)
TYPES = [
    ("a stack", "pub struct Stack<T> {\n    items: Vec<T>,\n}\n\nimpl<T> Stack<T> {\n    pub fn new() -> Self {\n        Self { items: Vec::new() }\n    }\n\n    pub fn push(&mut self, item: T) {\n        self.items.push(item);\n    }\n\n    pub fn pop(&mut self) -> Option<T> {\n        self.items.pop()\n    }\n\n    pub fn is_empty(&self) -> bool {\n        self.items.is_empty()\n    }\n}"),
    ("a queue", "use std::collections::VecDeque;\n\npub struct Queue<T> {\n    items: VecDeque<T>,\n}\n\nimpl<T> Queue<T> {\n    pub fn new() -> Self {\n        Self { items: VecDeque::new() }\n    }\n\n    pub fn push(&mut self, item: T) {\n        self.items.push_back(item);\n    }\n\n    pub fn pop(&mut self) -> Option<T> {\n        self.items.pop_front()\n    }\n}"),
    ("a counter", "#[derive(Debug, Default)]\npub struct Counter {\n    count: u64,\n}\n\nimpl Counter {\n    pub fn new() -> Self {\n        Self::default()\n    }\n\n    pub fn increment(&mut self) {\n        self.count += 1;\n    }\n\n    pub fn count(&self) -> u64 {\n        self.count\n    }\n}"),
    ("a point with a distance method", "#[derive(Debug, Clone, Copy, PartialEq)]\npub struct Point {\n    pub x: f64,\n    pub y: f64,\n}\n\nimpl Point {\n    pub fn new(x: f64, y: f64) -> Self {\n        Self { x, y }\n    }\n\n    pub fn distance(&self, other: &Point) -> f64 {\n        (self.x - other.x).hypot(self.y - other.y)\n    }\n}"),
    ("a rectangle with an area method", "#[derive(Debug, Clone, Copy)]\npub struct Rectangle {\n    pub width: f64,\n    pub height: f64,\n}\n\nimpl Rectangle {\n    pub fn new(width: f64, height: f64) -> Self {\n        Self { width, height }\n    }\n\n    pub fn area(&self) -> f64 {\n        self.width * self.height\n    }\n}"),
    ("a bank account", "#[derive(Debug)]\npub struct Account {\n    balance: u64,\n}\n\nimpl Account {\n    pub fn new() -> Self {\n        Self { balance: 0 }\n    }\n\n    pub fn deposit(&mut self, amount: u64) {\n        self.balance += amount;\n    }\n\n    pub fn withdraw(&mut self, amount: u64) -> Result<(), String> {\n        if amount > self.balance {\n            return Err(format!(\"balance is only {}\", self.balance));\n        }\n        self.balance -= amount;\n        Ok(())\n    }\n}"),
    ("a linked list", "pub struct List<T> {\n    head: Option<Box<Node<T>>>,\n}\n\nstruct Node<T> {\n    value: T,\n    next: Option<Box<Node<T>>>,\n}\n\nimpl<T> List<T> {\n    pub fn new() -> Self {\n        Self { head: None }\n    }\n\n    pub fn push(&mut self, value: T) {\n        let next = self.head.take();\n        self.head = Some(Box::new(Node { value, next }));\n    }\n\n    pub fn pop(&mut self) -> Option<T> {\n        self.head.take().map(|node| {\n            self.head = node.next;\n            node.value\n        })\n    }\n}"),
]

CITIES = ["Paris", "London", "Berlin", "Tokyo", "Madrid", "Rome", "Oslo", "Vienna", "Lisbon", "Prague", "Boston", "Chicago", "Toronto", "Sydney", "Delhi", "Cairo", "Lima", "Dublin", "Athens", "Warsaw", "Geneva", "Kyoto", "Seoul", "Lagos", "Nairobi", "Austin", "Denver", "Munich", "Milan", "Porto"]
PEOPLE = ["Ada", "Alice", "Bob", "Carol", "Dave", "Eve", "Grace", "Linus", "Mary", "Noah", "Olga", "Paul", "Rosa", "Tom", "Zoe"]
WORDS = ["apple", "river", "stone", "house", "garden", "window", "orange", "silver", "planet", "forest", "bridge", "candle", "rabbit", "yellow", "number", "letter", "mountain", "keyboard", "memory", "thread", "vector", "string", "iterator", "closure", "compiler", "engine", "expert", "router", "token", "cache", "rust", "cargo", "crate", "trait", "struct", "macro", "async", "borrow", "owner", "lifetime"]
FILES = ["src/main.rs", "src/lib.rs", "Cargo.toml", "README.md", "src/parser.rs", "src/config.rs", "tests/basic.rs", "notes.txt", "data/input.csv", "src/server.rs", "benches/sort.rs", "docs/guide.md", "build.rs", "src/error.rs"]
FOLDERS = ["src", "tests", "docs", ".", "examples", "benches", "crates", "data"]
LANGUAGES = ["French", "German", "Spanish", "Italian", "Japanese", "Portuguese"]
