"""DeepSeek-V3.2's prompt, whose folder has no chat template: the form that its `encoding` documentation publishes.

Written as a template so that it runs where templates run, with their variables and limits. `thinking` (or
`enable_thinking`) opens reasoning; reasoning before the last user message is left out.

# differs: the reference rejects an answer in thinking mode that has neither reasoning nor calls, and results that are
fewer than the calls; here they are rendered, since clients send both.
"""

TOOL_PROMPT = """## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the \
user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:
<｜DSML｜function_calls>
...
</｜DSML｜function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
SCHEMAS
</functions>
"""

_BEFORE, _AFTER = TOOL_PROMPT.split("SCHEMAS")

TEMPLATE = (
    """
{%- set thinks = thinking | default(false) or enable_thinking | default(false) %}
{%- set ns = namespace(user=-1, system=-1, answered=false) %}
{%- for message in messages %}
    {%- if message.role in ['user', 'developer'] %}{% set ns.user = loop.index0 %}{% endif %}
    {%- if message.role == 'system' and ns.system < 0 %}{% set ns.system = loop.index0 %}{% endif %}
{%- endfor %}
{%- macro tools_text() %}{{ '\\n\\n' }}{% raw %}"""
    + _BEFORE
    + "{% endraw %}{% for tool in tools %}{{ tool.function | tojson }}{{ '' if loop.last else '\\n' }}{% endfor %}"
    + "{% raw %}"
    + _AFTER
    + """{% endraw %}{% endmacro %}
{%- macro opened(inside) %}{{ '<think>' if inside else '</think>' }}{% endmacro %}
{{- bos_token }}
{%- if tools and ns.system < 0 %}{{ tools_text() }}{% endif %}
{%- for message in messages %}
    {%- set is_last = loop.last %}
    {%- if message.role == 'system' %}
        {{- message.content }}
        {%- if tools and loop.index0 == ns.system %}{{ tools_text() }}{% endif %}
    {%- elif message.role in ['user', 'developer'] %}
        {{- '<｜User｜>' }}
        {%- if message.role == 'developer' %}{{ "\\n\\n# The user's message is: " }}{% endif %}
        {{- message.content }}
        {%- if add_generation_prompt or not is_last %}
            {{- '<｜Assistant｜>' + opened(thinks and loop.index0 == ns.user) }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem is undefined or loop.previtem.role != 'tool' %}{{ '\\n\\n<function_results>' }}{% endif %}
        {{- '\\n<result>' + message.content + '</result>' }}
        {%- if is_last or loop.nextitem.role != 'tool' %}
            {{- '\\n</function_results>\\n\\n' }}
            {%- if add_generation_prompt or not is_last %}
                {{- opened(thinks and loop.index0 > ns.user) }}
            {%- endif %}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {%- if thinks and loop.index0 > ns.user %}
            {{- (message.reasoning_content or '') + '</think>' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- if message.tool_calls %}
            {{- '\\n\\n<｜DSML｜function_calls>' }}
            {%- for call in message.tool_calls %}
                {{- '\\n<｜DSML｜invoke name="' + call.function.name + '">' }}
                {%- for key, value in call.function.arguments.items() %}
                    {{- '\\n<｜DSML｜parameter name="' + key + '" string="' }}
                    {{- 'true">' if value is string else 'false">' }}
                    {{- (value if value is string else value | tojson) + '</｜DSML｜parameter>' }}
                {%- else %}{{ '\\n' }}{% endfor %}
                {{- '\\n</｜DSML｜invoke>' }}
            {%- endfor %}
            {{- '\\n</｜DSML｜function_calls>' }}
        {%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""
)
