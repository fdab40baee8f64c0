"""A little language for kernels: LLVM's builder with loops, and with loads and stores by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

__all__ = ["HALF_TYPES", "I8", "I32", "I64", "PTR", "Emitter", "float_type", "function", "item_bytes", "wide"]

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
PTR = ir.PointerType()


HALF_TYPES = ("bfloat16", "float16")  # which are read as float32


def wide(dtype: str) -> str:
    """Return the dtype in which numbers of ``dtype`` are multiplied and added up, and products are written."""
    return "float32" if dtype in HALF_TYPES else dtype


def item_bytes(dtype: str) -> int:
    """Return how many bytes a number of ``dtype`` takes in memory."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def float_type(dtype: str) -> Any:
    """Return the type in which numbers of ``dtype`` are multiplied and added up."""
    return {"float32": ir.FloatType(), "float64": ir.DoubleType()}[wide(dtype)]


def _stored(dtype: str, lanes: int) -> tuple[Any, Any]:
    """Return the type of one number, and of ``lanes``, as they lie in memory."""
    one = {"bfloat16": ir.IntType(16), "float16": ir.HalfType()}.get(dtype) or float_type(dtype)
    return one, ir.VectorType(one, lanes) if lanes else one


@contextmanager
def function(module: ir.Module, name: str, result: Any, arguments: Sequence[Any]) -> Iterator[Emitter]:
    """Give an emitter of a new function of ``module``; its arguments are ``emitter.function.args``."""
    made = ir.Function(module, ir.FunctionType(result, list(arguments)), name)
    made.attributes.add("nounwind")
    emitter = Emitter(made.append_basic_block())
    yield emitter
    if not emitter.block.is_terminated:
        emitter.ret_void()


class Emitter(ir.IRBuilder):  # type: ignore[misc]
    """Emits the instructions of one function. Numbers of Python stand for constants of 64 bits."""

    def number(self, value: Any) -> Any:
        """Return a value of 64 bits."""
        return I64(value) if isinstance(value, int) else value

    def room(self, kind: Any, count: int) -> Any:
        """Return a place on the stack for ``count`` entries of ``kind``, aligned for registers of any width."""
        made = self.alloca(kind, count)
        made.align, made.type = 64, PTR
        return made

    def address(self, name: str) -> Any:
        """Return where a function of the module begins."""
        return self.bitcast(self.module.globals[name], PTR)

    def sum(self, *terms: Any) -> Any:
        """Return the sum of whole numbers."""
        total = self.number(terms[0])
        for term in terms[1:]:
            total = self.add(total, self.number(term))
        return total

    def times(self, *factors: Any) -> Any:
        """Return the product of whole numbers."""
        product = self.number(factors[0])
        for factor in factors[1:]:
            product = self.mul(product, self.number(factor))
        return product

    def over(self, numerator: Any, denominator: Any) -> Any:
        """Return the quotient of whole numbers, rounded down."""
        return self.udiv(self.number(numerator), self.number(denominator))

    def rounded_up(self, numerator: Any, denominator: Any) -> Any:
        """Return the quotient of whole numbers, rounded up."""
        return self.over(self.sum(numerator, denominator, -1), denominator)

    def least(self, one: Any, other: Any) -> Any:
        """Return the smaller of two whole numbers, which count from 0."""
        one, other = self.number(one), self.number(other)
        return self.select(self.icmp_unsigned("<", one, other), one, other)

    def most(self, one: Any, other: Any) -> Any:
        """Return the larger of two whole numbers, which count from 0."""
        one, other = self.number(one), self.number(other)
        return self.select(self.icmp_unsigned("<", one, other), other, one)

    def less(self, one: Any, other: Any) -> Any:
        """Whether one whole number is below the other."""
        return self.icmp_unsigned("<", self.number(one), self.number(other))

    def are_all_below(self, numbers: Any, bound: Any) -> Any:
        """Whether all lanes of a vector of whole numbers, which count from 0, are below one of 64 bits."""
        lanes = ir.IntType(numbers.type.count)
        bounds = self.spread(self.trunc(bound, numbers.type.element), numbers.type)
        are_below = self.bitcast(self.icmp_unsigned("<", numbers, bounds), lanes)
        return self.icmp_unsigned("==", are_below, lanes(-1))

    def place(self, pointer: Any, index: Any, kind: Any) -> Any:
        """Return where entry ``index`` of an array of ``kind`` lies."""
        return self.gep(pointer, [self.number(index)], source_etype=kind)

    def in_register(self, pointer: Any) -> Any:
        """Return a pointer that is worked out by itself, not in each instruction that reads what lies near it.

        Those of Intel take such an instruction apart if it reads at the sum of two registers, so that half as many are under
        way at a time: products by rows took 4 to 8 % longer.
        """
        return self.asm(ir.FunctionType(PTR, [PTR]), "", "=r,0", [pointer], side_effect=False)

    def get(self, pointer: Any, index: Any, kind: Any, of: Any = None) -> Any:
        """Return what lies at entry ``index`` of an array of ``of``, taken for a ``kind``, aligned as an entry is."""
        of = of or kind
        return self.load(self.place(pointer, index, of), align=_size(of), typ=kind)

    def read(self, pointer: Any, index: Any, dtype: str, lanes: int = 0) -> Any:
        """Return the number at entry ``index`` of an array of a dtype, or a vector of ``lanes`` from there on, widened."""
        one, many = _stored(dtype, lanes)
        found, kind = self.get(pointer, index, many, one), float_type(dtype)
        kind = ir.VectorType(kind, lanes) if lanes else kind
        if dtype == "bfloat16":  # the upper half of a float32
            bits = ir.VectorType(I32, lanes) if lanes else I32
            sixteen = ir.Constant(bits, [16] * lanes if lanes else 16)
            return self.bitcast(self.shl(self.zext(found, bits), sixteen), kind)
        return self.fpext(found, kind) if dtype == "float16" else found

    def at(self, pointer: Any, index: Any, dtype: str) -> Any:
        """Return where entry ``index`` of an array of a dtype lies."""
        return self.place(pointer, index, _stored(dtype, 0)[0])

    def put(self, value: Any, pointer: Any, index: Any, of: Any = None) -> None:
        """Write ``value`` from entry ``index`` of an array of ``of`` on."""
        of = of or value.type
        self.store(value, self.place(pointer, index, of), align=_size(of))

    def whole(self, value: Any) -> Any:
        """Return a number of 32 bits, which counts from 0, in 64."""
        return self.zext(value, I64)

    def spread(self, scalar: Any, kind: Any) -> Any:
        """Return a vector, all of whose lanes are ``scalar``."""
        if not isinstance(kind, ir.VectorType):
            return scalar
        one = self.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, kind.count), None)
        )

    def multiply_add(self, one: Any, other: Any, total: Any) -> Any:
        """Return ``one · other + total``, rounded once."""
        kind = one.type
        name = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
        element = kind.element if name else kind
        name += "f32" if isinstance(element, ir.FloatType) else "f64"
        return self.intrinsic(f"llvm.fma.{name}", kind, [one, other, total])

    def intrinsic(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """Call one of LLVM's own functions, whose result has the type ``result``."""
        kinds = [argument.type for argument in arguments]
        found = self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, kinds), name)
        return self.call(found, arguments)

    def fetch(self, pointer: Any, offset: int, *, to_write: bool = False) -> None:
        """Have the line of memory ``offset`` bytes further on brought into the first cache; any address will do."""
        line = self.gep(pointer, [I64(offset)], source_etype=I8)
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), [line, I32(int(to_write)), I32(3), I32(1)])

    def zero(self, pointer: Any, count: Any) -> None:
        """Write ``count`` bytes of 0."""
        arguments = [pointer, I8(0), self.number(count), ir.IntType(1)(0)]
        self.intrinsic("llvm.memset.p0.i64", ir.VoidType(), arguments)

    def call_pointer(self, pointer: Any, kind: Any, arguments: Sequence[Any]) -> Any:
        """Call the function at ``pointer``, which has the type ``kind``."""
        return self.call(_AtPointer(pointer, kind), arguments)

    def call_address(self, address: int, kind: Any, arguments: Sequence[Any]) -> Any:
        """Call the function at an address of this process."""
        return self.call_pointer(self.inttoptr(I64(address), PTR), kind, arguments)

    def lanes(self, one: Any, other: Any, chosen: Sequence[int]) -> Any:
        """Return the lanes ``chosen`` of two vectors side by side."""
        mask = ir.Constant(ir.VectorType(I32, len(chosen)), list(chosen))
        return self.shuffle_vector(one, other, mask)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Any]:
        """Emit what is in the block for each number from ``start`` to below ``stop``."""
        with self.while_loop([self.number(start)], lambda at: self.less(at[0], stop)) as (values, following):
            yield values[0]
            following.append(self.add(values[0], self.number(step)))

    @contextmanager
    def while_loop(
        self, starts: Sequence[Any], *conditions: Callable[[list[Any]], Any]
    ) -> Iterator[tuple[list[Any], list[Any]]]:
        """Emit a loop that carries values, as long as all conditions hold; each is looked at only if those before hold.

        Gives the values, which are the last ones after the loop, and a list that takes the next ones.
        """
        before, end = self.block, self.append_basic_block()
        head = self.append_basic_block()
        self.branch(head)
        self.position_at_end(head)
        values = [self.phi(start.type) for start in starts]
        for value, start in zip(values, starts, strict=True):
            value.add_incoming(start, before)
        for condition in conditions:
            onward = self.append_basic_block()
            self.cbranch(condition(values), onward, end)
            self.position_at_end(onward)
        following: list[Any] = []
        yield values, following
        for value, next_value in zip(values, following, strict=True):
            value.add_incoming(next_value, self.block)
        self.branch(head)
        self.position_at_end(end)


class _AtPointer:
    """A function of which only the address is known, as the builder calls one."""

    def __init__(self, pointer: Any, kind: Any) -> None:
        self.function_type, self._pointer = kind, pointer
        self.type, self.get_reference = pointer.type, pointer.get_reference


def _size(kind: Any) -> int:
    if isinstance(kind, ir.IntType):
        return int(kind.width) // 8
    return {ir.HalfType: 2, ir.FloatType: 4, ir.DoubleType: 8, ir.PointerType: 8}[type(kind)]
