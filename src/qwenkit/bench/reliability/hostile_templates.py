"""Chat templates that attack, by name: code, bombs, and nonsense."""

from __future__ import annotations

_GROW = "{{% set n = namespace(x={0}) %}}{{% for i in range(60) %}}{1}{{% endfor %}}{{{{ n.x }}}}"
_BIG = "{% set x = 'y' * 290000 %}{% for i in range(99999) %}"

CODE = {
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__'] }}",
    "class of a message": "{{ messages[0].__class__ }}",
    "class of a list": "{{ messages.__init__.__globals__['os'].system('id') }}",
    "loop": "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "map attribute": "{{ ['']|map(attribute='__class__')|list }}",
    "sort attribute": "{{ ['', 'a']|sort(attribute='__class__')|list }}",
    "format attribute": "{{ '{0.__class__}'.format('') }}",
    "format item": "{{ '{m[0]}'.format(m=messages) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "self": "{{ self.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'] }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "range": "{{ range.__class__ }}",
    "caller": "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "from import": "{% from 'os' import system %}",
    "extends": "{% extends 'x' %}",
    "autoescape": "{% autoescape true %}{{ messages }}{% endautoescape %}",
}
BOMBS = {
    "long loop": "{% for i in range(1000000000) %}x{% endfor %}",
    "nested loops": "{% for a in range(49999) %}{% for b in range(49999) %}"
    "{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(49999) %}{% for b in range(49999) if false %}"
    "{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1,2] recursive %}{{ loop([1,2]) }}{% endfor %}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "macro recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "block recursion": "{% block b %}{{ self.b() }}{% endblock %}",
    "multiply": "{{ 'a' * 1000000000 }}",
    "multiply a content": "{{ messages[0].content * 1000000000 }}",
    "multiply a list": "{{ ([0] * 1000000000) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "growing number": _GROW.format("2", "{% set n.x = n.x * n.x %}"),
    "growing sum": _GROW.format("'a'", "{% set n.x = n.x + n.x %}"),
    "growing joint": _GROW.format("'a'", "{% set n.x = n.x ~ n.x %}"),
    "growing replacement": _GROW.format("'a'", "{% set n.x = n.x.replace('a','aa') %}"),
    "growing join": _GROW.format("'a'", "{% set n.x = [n.x,n.x]|join('a') %}"),
    "growing block": _GROW.format(
        "'a'", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
    ),
    "growing format": _GROW.format("'a'", "{% set n.x = '%s%s' % (n.x, n.x) %}"),
    "shared lists": _GROW.format("[1]", "{% set n.x = [n.x, n.x] %}"),
    "shared tuples": _GROW.format("(1,)", "{% set n.x = (n.x, n.x) %}{% set z = {n.x: 1} %}"),
    "shared dictionaries": _GROW.format("dict()", "{% set n.x = dict(a=n.x, b=n.x) %}"),
    "shared namespaces": _GROW.format("1", "{% set n.x = namespace(a=n.x, b=n.x) %}"),
    "deep list": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "much text": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set n.x = n.x + ['y' * 290000] %}{% endfor %}",
    "much output": "{% set x = 'y' * 90000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "many lists": "".join(f"{{% set a{i} = range(40000)|list %}}" for i in range(500)),
    "many texts": "".join(f"{{% set a{i} = 'y' * 90000 %}}" for i in range(900)),
    "many pieces": "{% set x = 'y ' * 40000 %}"
    + "".join(f"{{% set a{i} = x.split() %}}" for i in range(500)),
    "center": "{{ 'x' | center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "format filter": "{{ '%1000000000s' | format('x') }}",
    "format width": "{{ '{:>1000000000}'.format('x') }}",
    "nested format width": "{{ '{:>{w}}'.format('x', w=1000000000) }}",
    "indent": "{{ 'x\ny' | indent(1000000000) }}",
    "indent with text": "{{ ('x\n' * 40000) | indent('y' * 100000) }}",
    "tojson indent": "{{ [1] | tojson(indent=1000000000) }}",
    "tojson separators": "{{ ([1]*40000) | tojson(separators=('x'*400000,'y')) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "sum of lists": "{{ ([[1]*50]*800) | sum(start=[]) }}",
    "slices": _BIG + "{% set z = x[1:] %}{% endfor %}",
    "comparisons": "{% set x = range(40000)|list %}{% set w = range(40000)|list %}"
    "{% for i in range(99999) %}{% if x == w %}{% endif %}{% endfor %}",
    "searches": "{% set x = range(40000)|list %}{% for i in range(99999) %}"
    "{% if -1 in x %}{% endif %}{% endfor %}",
    "sorts": "{% for i in range(99999) %}{% set x = range(40000)|sort(reverse=true) %}{% endfor %}",
    "cases": _BIG + "{% set z = x|upper|title %}{% endfor %}",
    "splits": _BIG + "{% set z = x.split('y') %}{% endfor %}",
    "replacements": _BIG + "{% set z = x.replace('y','z') %}{% endfor %}",
    "characters": _BIG + "{% for c in x %}{% endfor %}{% endfor %}",
    "list of characters": _BIG + "{% set z = x|list %}{% endfor %}",
    "selection": "{{ range(40000)|select('in', range(40000)|list)|list|length }}",
    "date": "{{ strftime_now('%Y' * 100000) }}",
}
NONSENSE = {
    "bad syntax": "{% for %}",
    "unclosed": "{% if messages %}",
    "unknown tag": "{% exec 'id' %}",
    "unknown filter": "{{ messages|pprint }}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 / 0 }}",
    "wrong type": "{{ messages[0].content + 1 }}",
    "print a function": "{{ raise_exception }}",
    "nested parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested lists": "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
    "nested nots": "{{ " + "not " * 10000 + "1 }}",
    "long sum": "{{ " + "1+" * 20000 + "1 }}",
    "nested ifs": "{% if messages %}" * 1000 + "x" + "{% endif %}" * 1000,
    "nested fors": "{% for a in messages %}" * 30 + "x" + "{% endfor %}" * 30,
    "chain of attributes": "{{ a" + ".a" * 20000 + " }}",
    "chain of filters": "{{ 'a'" + "|upper" * 6000 + " }}",
    "long": "{{ messages }}" * 100_000,
    "long number": "{{ " + "9" * 40000 + " }}",
}
HOSTILE = {**CODE, **BOMBS, **NONSENSE}
